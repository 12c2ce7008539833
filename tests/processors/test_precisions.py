"""Each precision is equal to the reference on this processor, whose kernels may be others than those of the export."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import FloatArray, Precision
from chameleon_deploy.runtime.decode import session
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.verify.gates import GATES, Gate
from tests.processors.record import PRECISIONS, TOKENS, Reference

# The KL limits of 4 bits allow what real models lose, which is more than the tiny one loses and than its adapter
# changes; of a hundred positions, a few may have another best token.
TINY_GATES = {**GATES, "int4": replace(GATES["int4"], kl_mean=2e-2, kl_p999=2e-1, top1_agreement=0.75)}
READ, STEPS = 4, 2  # tokens of a prompt, and those after it, whose products have one row for each text


def whole_logits(runtime: Runtime, rows: list[list[int]], factors: RowFactors) -> FloatArray:
    """Return the logits [rows, TOKENS, vocab] of texts that are read whole."""
    return np.concatenate([np.asarray(piece) for _, piece in runtime.decoder.all_logits(rows, factors)], 1)


def stepped_logits(runtime: Runtime, rows: list[list[int]], factors: RowFactors) -> FloatArray:
    """Return the logits [rows, 1 + STEPS, vocab] of a prompt's last position and of tokens that are read one by one."""
    prompts, later = [ids[:READ] for ids in rows], np.array(rows).T[READ : READ + STEPS]
    decoder = runtime.decoder
    if isinstance(decoder, SharedCacheDecoder):
        slots = decoder.slots(len(rows), TOKENS)
        stepped = [slots.prefill(0, prompts, factors, 1)[:, 0].copy()]
        stepped += [slots.step(token_ids, factors).copy() for token_ids in later.tolist()]
    else:
        last, cache = decoder.prefill(prompts, factors, TOKENS)
        stepped = [np.array(last)]
        stepped += [np.array(decoder.step(token_ids, factors, cache)) for token_ids in later]
    return np.stack(stepped, 1)


def log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def missed(gate: Gate, actual: FloatArray, expected: FloatArray) -> list[str]:
    """The figures of a gate that logits miss, as text."""
    q, p = log_softmax(actual), log_softmax(expected)
    kl = (np.exp(p) * (p - q)).sum(-1)
    scale = max(1.0, float(np.sqrt(expected.astype(np.float64).var(-1).mean())) / 4)
    ranked = np.sort(expected, -1)
    gaps = ranked[..., -1] - ranked[..., -2]
    other_best = (actual.argmax(-1) != expected.argmax(-1))[gaps > gate.top1_gap * scale]
    figures = [
        ("mean KL", float(kl.mean()), gate.kl_mean),
        ("99.9th percentile of KL", float(np.quantile(kl, 0.999)), gate.kl_p999),
        ("logits", float(np.abs(actual - expected).max()) / scale, gate.max_abs_logit or np.inf),
        ("other best tokens", float(other_best.mean()), 1 - gate.top1_agreement),
    ]
    return [f"{name}: {value:.3g}, limit {limit:.3g}" for name, value, limit in figures if not value <= limit]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_equals_the_reference(recorded: Path, reference: Reference, precision: Precision) -> None:
    runtime, rows = chameleon_deploy.load(recorded / precision, threads=1), reference.rows
    factors = runtime.adapt(rows, mode="cohort").factors
    assert missed(TINY_GATES[precision], whole_logits(runtime, rows, factors), reference.logits) == []
    stepped = reference.logits[:, READ - 1 : READ + STEPS]
    assert missed(TINY_GATES[precision], stepped_logits(runtime, rows, factors), stepped) == []


def test_a_gate_notices_the_base_model_in_place_of_the_adapted_one(recorded: Path, reference: Reference) -> None:
    runtime = chameleon_deploy.load(recorded / "fp32", threads=1)
    factors = runtime.adapt(reference.rows, mode="none").factors
    whole = whole_logits(runtime, reference.rows, factors)
    assert all(missed(TINY_GATES[precision], whole, reference.logits) for precision in PRECISIONS)


@pytest.mark.skipif("CHAMELEON_SATURATES" not in os.environ, reason="names an emulated processor whose sums saturate")
def test_a_gate_notices_sums_that_saturate(
    recorded: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert session.exact_weights() == "uint8"
    monkeypatch.setattr(session, "exact_weights", lambda: "int8")
    runtime = chameleon_deploy.load(recorded / "int8", threads=1)
    factors = runtime.adapt(reference.rows, mode="cohort").factors
    assert missed(GATES["int8"], whole_logits(runtime, reference.rows, factors), reference.logits)
