"""Gates and checks as values: what passes at the limit, and what a gate becomes elsewhere."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import get_args

import pytest

from chameleon_deploy.contract.bundle import INTEGERS, Precision
from chameleon_deploy.verify.gates import GATES, TENSORRT_FP32, Check, accept, gate_of

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "passed"),
    [
        (1.0, 1.0, False, True), (1.0, 1.0, True, True), (1.1, 1.0, False, False), (1.1, 1.0, True, True),
        (0.9, 1.0, False, True), (0.9, 1.0, True, False), (7.0, None, False, True), (7.0, None, True, True),
    ],
)  # fmt: skip
def test_a_figure_at_its_limit_passes(value: float, limit: float | None, at_least: bool, passed: bool) -> None:
    assert Check("a figure", value, limit, at_least=at_least).passed is passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [None, 0.0, math.inf, -math.inf])
@pytest.mark.parametrize("at_least", [False, True])
def test_a_figure_that_is_not_finite_never_passes(value: float, limit: float | None, at_least: bool) -> None:
    assert not Check("a figure", value, limit, at_least=at_least).passed


def test_a_check_is_an_upper_limit_unless_it_says_otherwise() -> None:
    assert not Check("a figure", 2.0, 1.0).passed


# The columns of docs/design.md are compared with it by tests/test_docs.py; these are only in words there.
@pytest.mark.parametrize(
    ("precision", "summation_order", "rounding"),
    [("fp32", 5e-4, 5e-4), ("fp16", 1e-4, 5e-2), ("bf16", 1e-4, 3e-1), ("int8", 1e-3, 3e-1), ("int4", 1e-3, 3e-1)],
)
def test_tolerances(precision: Precision, summation_order: float, rounding: float) -> None:
    gate = gate_of(precision, "cpu")
    assert gate is GATES[precision]
    assert (gate.summation_order_tolerance, gate.rounding_tolerance) == (summation_order, rounding)
    assert gate.cache_tolerance == (rounding if precision == "fp32" else None)


def test_tolerances_of_the_adaptation() -> None:
    for precision in PRECISIONS:
        gate = GATES[precision]
        found = gate.embedding_tolerance, gate.cluster_margin, gate.factor_tolerance
        assert found == ((1e-2, 1e-3, 2e-2) if precision in INTEGERS else (1e-5, 1e-5, 1e-4))


def test_the_gates_of_devices() -> None:
    assert gate_of("fp32", "tensorrt") is TENSORRT_FP32
    gate = TENSORRT_FP32
    assert gate.summation_order_tolerance == gate.rounding_tolerance == gate.cache_tolerance == 1e-3
    for precision in PRECISIONS:
        for provider in ("cuda", "tensorrt"):
            if (precision, provider) != ("fp32", "tensorrt"):
                expected = {
                    **asdict(GATES[precision]),
                    "summation_order_tolerance": GATES[precision].rounding_tolerance,
                }
                assert asdict(gate_of(precision, provider)) == expected
        same_order = precision == "fp32"  # an update in the trunk can round an activation differently, elsewhere
        assert (gate_of(precision, "cpu", updates_trunk=True) is GATES[precision]) == same_order


def test_an_accepted_kl_relaxes_what_grows_with_it() -> None:
    gate = GATES["int8"]
    relaxed = asdict(accept(gate, 3 * gate.kl_mean))
    for name, value in asdict(gate).items():
        if name in ("kl_mean", "kl_p999", "perplexity"):
            assert relaxed[name] == pytest.approx(3 * value)
        elif name == "top1_agreement":
            assert relaxed[name] == pytest.approx(1 - 3 * (1 - value))
        else:
            assert relaxed[name] == value
    assert accept(gate, 0.99 * gate.kl_mean) == accept(gate, gate.kl_mean) == gate
    assert accept(gate, 1000 * gate.kl_mean).top1_agreement == 0.0
