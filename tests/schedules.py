"""Schedules of requests for the engine without its thread; the C++ counterpart is runtime/tests/schedules.h.

A schedule is a JSON object: the engine's settings, and submits, each at an iteration of the engine's loop and with the
iteration at which it is cancelled. Since iterations are counted and not timed, every run of a schedule has the same
batches, and what the rows get can be compared exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from chameleon_deploy import Adapt, Generate, Runtime, Sampling, Stream, Tenant
from chameleon_deploy.contract.bundle import ModelSpec
from chameleon_deploy.runtime.decode.prefix_cache import BLOCK_TOKENS
from chameleon_deploy.runtime.decode.schedule import Schedule
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.loop import Loop, open_batch
from chameleon_deploy.runtime.engine.stream import deliver
from chameleon_deploy.runtime.engine.submission import form_cohort, prepare
from tests.shared_data import caller_factors

TENANTS: list[dict[str, Any]] = [
    {"name": "a", "weight": 1, "rows": None}, {"name": "b", "weight": 3, "rows": None},
    {"name": "c", "weight": 1, "rows": 1},
]  # fmt: skip
EXPIRED = 1e-9  # a deadline that is over at once
MOST_CONTINUED = 80  # tokens of a text that another continues
OVERFLOW = 3e38  # factors of this value are finite, and the logits of their rows are not


def random_schedule(random: np.random.Generator, runtime: Runtime) -> dict[str, Any]:
    model = runtime.manifest.model
    rows = int(random.integers(1, 6))
    capacity = int(random.choice([20, 40, model.max_positions]))
    schedule: dict[str, Any] = {
        "rows": rows,
        "prefill_tokens": int(random.choice([8, 9, 16])),
        "max_factor_sets": int(random.integers(1, rows + 1)),
        "capacity": min(capacity, model.max_positions),
        "submits": [],
    }
    arrival = 0
    for _ in range(int(random.integers(1, 9))):
        schedule["submits"].append(_random_submit(random, runtime, schedule["capacity"], arrival))
        arrival += int(random.choice([0, 0, 1, 3, 10]))
    return schedule


def _random_submit(random: np.random.Generator, runtime: Runtime, capacity: int, arrival: int) -> dict[str, Any]:
    model, modes = runtime.manifest.model, runtime.manifest.adaptation.modes
    mode = str(random.choice(modes))
    longest = int(random.choice([3, 12, capacity]))
    lengths = random.integers(1, longest + 1, int(random.choice([1, 1, 2, 4])))
    needs_factors = mode == "static" and (runtime.manifest.adaptation.regime == "chameleon" or random.random() < 0.5)
    per_prompt = random.random() < 0.5
    submit: dict[str, Any] = {
        "at": arrival,
        "prompts": [random.integers(0, model.vocab_size, length).tolist() for length in lengths],
        "mode": mode,
        "tenant": f"t{random.integers(0, 2)}" if mode == "tenant" else None,
        "rank": int(random.integers(1, 4)) if needs_factors else None,
        "overflows": bool(needs_factors and random.random() < 0.2),
        "max_new_tokens": int(random.integers(1, 16)),
        "sampling": [random_settings(random, model) for _ in lengths] if per_prompt else random_settings(random, model),
        "n": int(random.choice([1, 1, 1, 2, 5])),
        "expires": bool(random.random() < 0.05),
        "adapt_tokens": int(random.integers(1, 5)) if random.random() < 0.2 else None,
        "cancel_at": arrival + int(random.integers(0, 12)) if random.random() < 0.2 else None,
    }
    if random.random() < 0.7:
        submit["of"] = dict(TENANTS[random.integers(len(TENANTS))])
    size = runtime.manifest.adaptation.conditioning_size
    if size and mode == "request":
        submit["conditioning"] = task_vectors(random, len(lengths), size)
    return submit


def random_prefix_schedule(random: np.random.Generator, runtime: Runtime) -> dict[str, Any]:
    """Texts that begin alike or continue one another, and a prefix cache that is too small for them."""
    model, spec = runtime.manifest.model, runtime.manifest.adaptation
    modes = [*["none"] * 8, "centroid", "request", "cohort", "tenant"]
    invocations = [list(tokens) for tokens in spec.invocation_tokens.values()]
    assert isinstance(runtime.decoder, SharedCacheDecoder)
    beginnings = [random.integers(0, model.vocab_size, length).tolist() for length in (20, 48, 70)]
    schedule: dict[str, Any] = {
        "rows": 3, "prefill_tokens": 16, "max_factor_sets": 3, "capacity": model.max_positions,
        "prefix_cache_blocks": int(random.choice([10, 20])), "submits": [],
    }  # fmt: skip
    arrival = 0
    for number in range(20):
        beginning = beginnings[random.integers(3)]
        own = random.integers(0, model.vocab_size, random.integers(1, 30)).tolist()
        continued = int(random.integers(number)) if number and random.random() < 0.4 else None
        if invocations and random.random() < 0.5:
            own = [*invocations[0], *own]
        mode = None if spec.adapters else str(random.choice(modes))
        drafts = runtime.decoder.is_exact and random.random() < 0.3
        schedule["submits"].append({
            "at": arrival,
            "prompts": [own if continued is not None else beginning[: random.choice([10, 40, 70])] + own],
            "continues": continued,
            "mode": mode, "tenant": f"t{random.integers(2)}" if mode == "tenant" else None, "rank": None,
            "overflows": False, "expires": False,
            "max_new_tokens": int(random.integers(1, 20)),
            "sampling": random_settings(random, model),
            "n": int(random.choice([1, 1, 3])),
            "adapt_tokens": None,
            "cancel_at": arrival + int(random.integers(12)) if random.random() < 0.1 else None,
            "of": {"name": str(random.choice(["", "", "a", "b"])), "weight": 1, "rows": None},
            "cache_salt": str(random.choice(["", "a"])),
            "cache_generated": bool(random.random() < 0.7),
            "prompt_lookup_num_tokens": 4 if drafts else 0,
            "adapters": [str(random.choice(spec.adapters))] if spec.adapters and random.random() < 0.8 else None,
        })  # fmt: skip
        arrival += int(random.choice([0, 1, 10, 30]))
    return schedule


def task_vectors(random: np.random.Generator, count: int, size: int) -> list[list[float]]:
    """A vector of the caller for each text, of one of three tasks."""
    return [[float(i % 3 == task) for i in range(size)] for task in random.integers(0, 3, count)]


def random_settings(random: np.random.Generator, model: ModelSpec) -> dict[str, Any]:
    """Arguments of Sampling that JSON can hold."""
    if random.random() < 0.3:
        return {}
    return {
        "temperature": float(random.choice([0.0, 0.5, 1.0, 2.0])),
        "top_k": int(random.choice([0, 0, 1, 5, 50])),
        "top_p": float(random.choice([1.0, 0.9, 0.3])),
        "repetition_penalty": float(random.choice([1.0, 1.3])),
        "seed": int(random.integers(0, 2**63)),
        "stop_token_ids": [7, 8] if random.random() < 0.2 else [],
        "stop": ["e", "ing", "\u00e9t"] if random.random() < 0.4 else [],
        "presence_penalty": float(random.choice([0.0, 0.7])),
        "frequency_penalty": float(random.choice([0.0, 0.4, -0.2])),
        "logit_bias": [[int(random.integers(model.vocab_size)), float(random.uniform(-5, 5))]]
        if random.random() < 0.3
        else [],
        "ignore_eos": bool(random.random() < 0.3),
        "logprobs": int(random.integers(0, 6)) if random.random() < 0.2 else None,
    }


def run_schedule(runtime: Runtime, schedule: dict[str, Any]) -> dict[str, Any]:
    """What a schedule gives: the rows of every submit, the tokens that they were streamed, the iterations, and the
    prompt tokens that were found in the prefix cache.
    """
    prefixes, decoder = None, runtime.decoder
    if blocks := schedule.get("prefix_cache_blocks"):
        assert isinstance(decoder, SharedCacheDecoder)
        prefixes = decoder.prefix_cache(runtime.bundle.digest, blocks * BLOCK_TOKENS * decoder.token_bytes)
    table, submits = FactorTable(schedule["max_factor_sets"]), schedule["submits"]
    reading = Schedule(schedule["prefill_tokens"])
    batch = open_batch(runtime.backend, table, schedule["rows"], schedule["capacity"], reading, prefixes)
    loop = Loop(batch, table, runtime.tokenizer, runtime.manifest.model.eos_token_id)
    streams: list[Stream] = []
    iterations: list[list[int]] = []
    while len(streams) < len(submits) or loop:
        while len(streams) < len(submits) and submits[len(streams)]["at"] <= len(iterations):
            submit = submits[len(streams)]
            streams.append(_submit(runtime, loop, submit, _prompts(submit, streams), schedule["capacity"]))
        for stream, submit in zip(streams, submits, strict=False):
            if submit["cancel_at"] == len(iterations):
                stream.cancel()
        tokens, record = loop.iterate()
        deliver(tokens)
        iterations.append([
            record.rows, record.factor_sets, record.factor_set_hits, record.prefilled_tokens, len(record.queued),
            len(record.first_tokens), len(record.later_tokens), len(record.finished), batch.cached_tokens,
        ])  # fmt: skip
    result: dict[str, Any] = {
        "rows": [[_row(generation) for generation in stream.result(0)] for stream in streams],
        "tokens": [[[token.row, token.token_id, token.text] for token in stream] for stream in streams],
        "iterations": iterations,
    }
    if prefixes is not None:
        result["cached_tokens"] = [stream.cached_tokens for stream in streams]
        result["prefix_cache"] = list(dataclasses.astuple(prefixes.stats()))
    return result


def _prompts(submit: dict[str, Any], streams: list[Stream]) -> list[list[int]]:
    """Return the prompts of a submit, after the text of one that has ended and that it continues."""
    number = submit.get("continues")
    if number is None or not streams[number].done:
        return list(submit["prompts"])
    text = [*streams[number].prompts[0], *streams[number].result(0)[0].token_ids]
    return [text[:MOST_CONTINUED] + prompt for prompt in submit["prompts"]]


def _submit(runtime: Runtime, loop: Loop, submit: dict[str, Any], prompts: list[list[int]], capacity: int) -> Stream:
    given = submit["sampling"]
    sampling = Sampling(**given) if isinstance(given, dict) else [Sampling(**settings) for settings in given]
    factors = None if submit["rank"] is None else caller_factors(submit["rank"], runtime.manifest.model)
    if factors is not None and submit["overflows"]:
        factors = {name: np.full_like(matrix, OVERFLOW) for name, matrix in factors.items()}
    deadline = EXPIRED if submit["expires"] else None
    adapt = Adapt(
        mode=submit["mode"],
        tenants=None if submit["tenant"] is None else [submit["tenant"]] * len(submit["prompts"]),
        factors=factors,
        conditioning=submit.get("conditioning"),
        adapt_tokens=submit["adapt_tokens"],
        adapters=submit.get("adapters"),
    )
    generate = Generate(
        submit["max_new_tokens"], sampling, submit["n"], deadline,
        submit.get("prompt_lookup_num_tokens", 0), submit.get("cache_salt", ""), submit.get("cache_generated", True),
    )  # fmt: skip
    tenant = Tenant(**submit["of"]) if "of" in submit else Tenant()
    submission = prepare(runtime, prompts, generate, adapt, capacity, tenant)
    form_cohort(runtime, [submission], 0)
    loop.waiting.extend(submission.members)
    return submission.stream


def _row(generation: Any) -> dict[str, Any]:
    return {
        "token_ids": generation.token_ids,
        "text": generation.text,
        "cluster_id": generation.cluster_id,
        "finish_reason": generation.finish_reason,
        "error": None if generation.error is None else generation.error.code,
        "num_logprobs": len(generation.token_logprobs or ()),
    }
