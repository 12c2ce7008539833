"""`verify BUNDLE --here`: does this machine compute what the bundle records? Without the reference and PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_deploy.errors import NumericError
from chameleon_deploy.runtime import Runtime, load
from chameleon_deploy.runtime.known_answers import (
    KnownAnswers,
    ModeAnswers,
    adapt_rows,
    continued,
    encoded,
    hidden_states,
    recorded_answers,
    token_logprobs,
)
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.verify.gates import KNOWN_ANSWERS, OTHER_GRAPH, Check, KnownAnswerGate


def verify_here(bundle: Path, provider: str, threads: int | None) -> tuple[list[Check], dict[str, Any]]:
    """Load a bundle and compare what it computes with its record.

    Returns the checks and a record of them. Raises ManifestError for a bundle without a record, and what `load` raises.
    """
    runtime = load(bundle, provider, threads=threads)
    checks = known_answer_checks(runtime)
    record = {
        "provider": runtime.provider,
        "precision": runtime.manifest.precision,
        "machine": describe_machine(runtime.integer_weights),
        "verified": all(check.passed for check in checks),
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
    }
    return checks, record


def known_answer_checks(runtime: Runtime) -> list[Check]:
    """Compare what a runtime computes of the recorded texts with the record of its bundle."""
    answers = recorded_answers(runtime.bundle)
    gates = KNOWN_ANSWERS if runtime.graph == answers.graph else OTHER_GRAPH
    checks = _checks(runtime, answers, gates[runtime.manifest.precision])
    return [replace(check, graph=runtime.graph) for check in checks]


def _checks(runtime: Runtime, answers: KnownAnswers, gate: KnownAnswerGate) -> Iterator[Check]:
    pairs = zip(encoded(runtime, answers.texts), answers.token_ids, strict=True)
    wrong = sum(found != expected for found, expected in pairs)
    yield Check("known answers: texts whose token ids differ", wrong, 0, note=f"{len(answers.texts)} texts")
    yield _hidden_states(runtime, answers, gate)
    for mode, expected in answers.modes.items():
        adapt = adapt_rows(runtime, mode, len(answers.rows))
        try:
            yield _logprobs(mode, expected, token_logprobs(runtime, answers.rows, adapt), gate)
            yield _greedy(mode, expected, continued(runtime, answers.rows, adapt, [*map(len, expected.greedy)]), gate)
        except NumericError as error:
            yield Check(f"known answers: mode {mode}", math.nan, 0, note=str(error))


def _hidden_states(runtime: Runtime, answers: KnownAnswers, gate: KnownAnswerGate) -> Check:
    name, found = "known answers: hidden states, relative difference", hidden_states(runtime, answers.rows)
    if found is None or not answers.hidden_states:
        return Check(name, 0, limit=None, note="not checked: this graph or the recorded one returns none")
    expected = np.array(answers.hidden_states)
    difference = np.linalg.norm(np.array(found) - expected) / (np.linalg.norm(expected) or 1)
    return Check(name, float(difference), gate.hidden_states, note=f"{expected.size} values")


def _logprobs(mode: str, expected: ModeAnswers, found: Sequence[Sequence[float]], gate: KnownAnswerGate) -> Check:
    differences = np.abs(np.concatenate(found) - np.concatenate(expected.token_logprobs))
    return Check(
        f"known answers: mode {mode}, log-probabilities, mean difference",
        float(differences.mean()) if differences.size else 0.0,
        gate.logprob,
        note=f"{differences.size} tokens, at most {differences.max(initial=0):.2g}",
    )


def _greedy(mode: str, expected: ModeAnswers, found: Sequence[Sequence[int]], gate: KnownAnswerGate) -> Check:
    """After the first token that differs a text is another, so that the rest is not compared."""
    differ = compared = 0
    for ids, recorded, gaps in zip(found, expected.greedy, expected.gaps, strict=True):
        same = next((step for step, (a, b) in enumerate(zip(ids, recorded, strict=False)) if a != b), len(recorded))
        compared += same
        differ += same < len(recorded) and gaps[same] > gate.gap
    return Check(
        f"known answers: mode {mode}, texts whose greedy tokens differ", differ, 0, note=f"{compared} are equal"
    )
