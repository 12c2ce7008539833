"""Promises that need no reference: results do not depend on the rows of a call, their order or a rerun."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray, Mode
from chameleon_deploy.reference.corpus import prefix_ids
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.verify.gates import Check, Gate
from chameleon_deploy.verify.logit_checks import Rows, row_logits
from chameleon_deploy.verify.logit_figures import (
    largest,
    logit_scale,
    max_abs,
    score_difference,
)

BATCH_SIZES = (1, 2, 3, 4, 8, 32)
# Tokens of a row where 32 rows, or two very unequal ones, run in one call: GPT-2's logits of 512 positions are 103 MB.
BATCHED, PADDED_TO = 16, 256


def check_batching(runtime: Runtime, rows: Rows, gate: Gate, **arguments: Any) -> Iterator[Check]:
    """A row's logits do not depend on how many rows stand beside it, how long they are, or in which order."""
    arguments = arguments or given(runtime, runtime.mode, range(len(rows)))
    factors, tolerance = runtime.adapt(rows, on_device=True, **arguments).factors, gate.summation_order_tolerance
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    wide, rows = rows[longest][:PADDED_TO], [ids[:BATCHED] for ids in rows]

    def run_alone(row: int) -> FloatArray:
        return next(row_logits(runtime, [rows[row]], factors.rows(np.array([row]))))

    alone = [run_alone(row) for row in range(len(rows[:8]))]
    scale, differences = logit_scale(alone), []
    for size in BATCH_SIZES[1:]:
        members = rows[:size]
        batch = row_logits(runtime, members, factors.rows(np.arange(len(members))))
        further = map(run_alone, range(len(alone), len(members)))  # one at a time: 32 rows' logits are large
        expected = itertools.chain(alone[: len(members)], further)
        differences.append(largest(max_abs(a, b) for a, b in zip(expected, batch, strict=True)))
    worst = BATCH_SIZES[1:][int(np.argmax(differences))]
    yield Check("batch sizes 1, 2, 3, 4, 8, 32, max abs difference", largest(differences) / scale, tolerance,
                note=f"promise B is not made; worst at {worst}")  # fmt: skip
    backwards = list(row_logits(runtime, rows[:8][::-1], factors.rows(np.arange(8)[::-1])))
    yield Check("row order, max abs difference", largest(map(max_abs, alone, backwards[::-1])) / scale, tolerance)
    padded = next(row_logits(runtime, [rows[0], wide], factors.rows(np.array([0, longest]))))
    yield Check("padding, max abs difference", max_abs(alone[0], padded) / scale, tolerance,
                note=f"{len(rows[0])} tokens padded to {len(wide)}")  # fmt: skip


def check_scores(runtime: Runtime, rows: Rows, gate: Gate, **arguments: Any) -> Iterator[Check]:
    """Scores, which have a graph of their own, are what the decoder's logits say."""
    arguments = arguments or given(runtime, runtime.mode, range(len(rows)))
    logits = list(row_logits(runtime, rows, runtime.adapt(rows, **arguments).factors))
    difference = score_difference(runtime.score(rows, **arguments), logits) / logit_scale(logits)
    yield Check("scores against logits, max abs difference", difference, gate.summation_order_tolerance)


def check_rerun(runtime: Runtime, rows: Rows, **arguments: Any) -> Iterator[Check]:
    """Promise R: a rerun gives the same bits."""
    factors = runtime.adapt(rows, **(arguments or given(runtime, runtime.mode, range(len(rows))))).factors
    first, second = (list(row_logits(runtime, rows, factors)) for _ in range(2))
    yield Check("promise R: rerun, max abs difference", largest(map(max_abs, first, second)), 0)


def check_neighbours(runtime: Runtime, rows: Rows, **arguments: Any) -> Iterator[Check]:
    """In calls of one shape a row's logits are the same bits whatever text its neighbours hold."""
    length = min(8, runtime.manifest.model.max_positions)
    first = next(ids for ids in rows if len(ids) >= length)[:length]
    edited = [(token_id + 1) % runtime.manifest.model.vocab_size for token_id in first]
    both = runtime.adapt([first], **(arguments or {"mode": "none"})).factors.rows(np.zeros(2, np.int64))
    logits = [next(row_logits(runtime, [first, other], both)) for other in (first, edited)]
    yield Check("a neighbour's text: max abs difference", max_abs(*logits), 0)


def check_factors_alone(runtime: Runtime, rows: Rows) -> Iterator[Check]:
    """Promise F: in a batch-independent mode a row's factors are the same bits, whatever stands beside it."""
    modes: tuple[Mode, ...] = ("none", "centroid", "request")
    for mode in (m for m in modes if m in runtime.manifest.adaptation.modes):
        together = runtime.adapt(rows, mode=mode, **given(runtime, mode, range(len(rows)))).factors
        differences = []
        for row, ids in enumerate(rows):
            alone = runtime.adapt([ids], mode=mode, **given(runtime, mode, [row])).factors
            own = together.rows(np.array([row]))
            for name, array in own.sets[own.factor_ids].tensors.items():
                differences.append(max_abs(alone.sets.tensors[name], array))
        yield Check(f"promise F: mode {mode}, factors alone and in a batch", largest(differences), 0)


def given(runtime: Runtime, mode: Mode, rows: Sequence[int]) -> dict[str, Any]:
    """The argument `conditioning` of rows, for a bundle that takes the caller's vectors: any of length one."""
    size = runtime.manifest.adaptation.conditioning_size
    if not size or mode != "request":
        return {}
    vectors = np.stack([np.random.default_rng(row).normal(size=size) for row in rows])
    return {"conditioning": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)}


def check_texts(runtime: Runtime, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Iterator[Check]:
    """Check that texts in a batch have the token ids that the reference's tokenizer gives each of them alone.

    tokenizer  the reference's
    rows       their text is encoded again, which may differ from the rows if a character was cut
    """
    longest, before = max(map(len, rows)), len(prefix_ids(tokenizer))
    texts = [tokenizer.decode(ids[before:], skip_special_tokens=False) for ids in rows]
    alone = {text: tokenizer.encode(text).ids for text in texts}
    alone = {text: ids for text, ids in alone.items() if 0 < len(ids) <= longest}  # within the limits, like the rows
    mode: Mode | None = "none" if runtime.manifest.adaptation.conditioning_size else None  # else vectors are needed
    ours = runtime.score(list(alone), mode=mode)
    differ = sum(score.token_ids != ids for score, ids in zip(ours, alone.values(), strict=True))
    yield Check("texts whose token ids in a batch differ", differ, 0, note=f"{len(alone)} texts")
    from_texts, from_ids = (
        runtime.generate(list(prompts), max_new_tokens=1, mode=mode) for prompts in (alone, alone.values())
    )
    differ = sum(a != b for a, b in zip(from_texts, from_ids, strict=True))
    yield Check("texts whose first generated token differs from their token ids'", differ, 0)
