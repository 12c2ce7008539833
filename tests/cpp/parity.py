"""C++ against Python over random ragged batches: `python -m tests.cpp.parity BUNDLE [BATCHES [FIRST]]`.

FIRST goes on at that batch: a thousand of GPT-2 small take an hour of processor time.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import chameleon_deploy
from chameleon_deploy.contract.bundle import LM_HEAD, factor_names
from chameleon_deploy.runtime import Adaptation, Runtime, Sampling
from tests.cpp.c_interface import NativeRuntime
from tests.rows import head_factors

MODES = ("none", "static", "centroid", "request", "cohort", "tenant")


PARTS = ("cluster_ids", "embeddings", "factor_ids", *factor_names(LM_HEAD))


def _parts(adaptation: Adaptation) -> list[Any]:
    factors = adaptation.factors
    tensors = [np.asarray(factors.sets.tensors[name]) for name in factor_names(LM_HEAD)]
    return [adaptation.cluster_ids, adaptation.embeddings, factors.factor_ids, *tensors]


def random_batch(random: np.random.Generator, runtime: Any, mode: str) -> tuple[list[list[int]], dict[str, Any]]:
    model = runtime.manifest.model
    lengths = random.integers(1, random.choice([4, 24, 60]), random.integers(1, 9))
    rows = [random.integers(1, model.vocab_size, length).tolist() for length in lengths]
    how: dict[str, Any] = {"mode": mode}
    if mode == "tenant":
        how["tenants"] = [f"tenant {n}" for n in random.integers(0, 3, len(rows))]
    if mode == "static" and (runtime.manifest.adaptation.regime == "chameleon" or random.random() < 0.5):
        rank = int(random.integers(1, 6))
        how["factors"] = head_factors(
            random.standard_normal((rank, model.hidden_size)).astype(np.float32),
            random.standard_normal((rank, model.vocab_size)).astype(np.float32),
        )
    size = runtime.manifest.adaptation.conditioning_size
    if size and mode == "request":
        tasks = random.standard_normal((3, size)).astype(np.float32)
        how["conditioning"] = tasks[random.integers(0, 3, len(rows))]
    return rows, how


def random_sampling(random: np.random.Generator) -> Sampling:
    return Sampling(
        temperature=float(random.choice([0.0, 0.5, 1.0, 2.0])),
        top_k=int(random.choice([0, 1, 5, 50])),
        top_p=float(random.choice([1.0, 0.9, 0.3])),
        repetition_penalty=float(random.choice([1.0, 1.3])),
        seed=int(random.integers(0, 2**63)),
        stop_token_ids=[7, 8] if random.random() < 0.3 else [],
        stop=["e", "ing"] if random.random() < 0.2 else [],
        presence_penalty=float(random.choice([0.0, 0.7])),
        frequency_penalty=float(random.choice([0.0, 0.4, -0.2])),
        logit_bias={int(random.integers(1, 300)): float(random.uniform(-5, 5))} if random.random() < 0.3 else {},
        ignore_eos=bool(random.random() < 0.3),
    )


def both(bundle: Path) -> tuple[Runtime, NativeRuntime]:
    """The bundle in both languages, on one thread: two that spin in each take twice the processor time."""
    return chameleon_deploy.load(bundle, threads=1), NativeRuntime(bundle, threads=1)


def largest_difference(bundle: Path, batches: int, first: int = 0) -> float:
    """Of any log-probability, as a multiple of 1e-6 or, where that is larger, of a unit in its last place.

    Everything else has to be equal: clusters, factors to the last bit, and the tokens and text of three generations
    per batch, one greedy, one sampled, and one with a setting per row.
    """
    python, native = both(bundle)
    modes = [mode for mode in MODES if mode in python.manifest.adaptation.modes]
    random = np.random.default_rng(5)
    largest = 0.0
    for number in range(batches):
        rows, how = random_batch(random, python, modes[number % len(modes)])
        samplings = (Sampling(), random_sampling(random), [random_sampling(random) for _ in rows])
        if number < first:
            continue
        expected, actual = python.adapt(rows, **how), native.adapt(rows, **how)
        for name, left, right in zip(PARTS, _parts(expected), _parts(actual), strict=True):
            assert left.tobytes() == right.tobytes(), (number, name)
        for left, right in zip(python.score(rows, **how), native.score(rows, **how), strict=True):
            assert (left.token_ids, left.cluster_id) == (right.token_ids, right.cluster_id)
            ours, theirs = (np.array(score.token_logprobs, np.float32) for score in (left, right))
            difference = np.abs(ours.astype(np.float64) - theirs) / np.maximum(1e-6, np.spacing(np.abs(ours)))
            largest = max(largest, float(difference.max(initial=0)))
        for sampling in samplings:
            wanted = python.generate(rows, max_new_tokens=8, sampling=sampling, **how)
            assert native.generate(rows, max_new_tokens=8, sampling=sampling, **how) == wanted, (number, sampling)
        reporting = replace(random_sampling(random), logprobs=int(random.integers(0, 6)))
        wanted = python.generate(rows, max_new_tokens=8, sampling=reporting, **how)
        found = native.generate(rows, max_new_tokens=8, sampling=reporting, **how)
        for python_row, native_row in zip(wanted, found, strict=True):
            assert python_row.token_ids == native_row.token_ids
            ours, theirs = (np.array(row.token_logprobs, np.float32) for row in (python_row, native_row))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # of logits that differ in their last bits
            assert len(python_row.top_logprobs or ()) == len(native_row.top_logprobs or ())
    native.close()
    return largest


if __name__ == "__main__":
    batches, first = (int(number) for number in [*sys.argv[2:], *("1000", "0")[len(sys.argv) - 2 :]])
    print(f"largest difference {largest_difference(Path(sys.argv[1]), batches, first):.3f}")
