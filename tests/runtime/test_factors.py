"""Factors of callers are checked and stacked; smaller ranks are padded with zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from chameleon_deploy.contract.bundle import AdaptationSpec, TargetSpec
from chameleon_deploy.errors import FactorsError
from chameleon_deploy.runtime.factors import FactorSets, check_factors, no_factors, stack_sets, zero_set

SPEC = AdaptationSpec("chameleon", 2, 1.0, (TargetSpec("t", 3, 5), TargetSpec("lm_head", 3, 4)), 0, "masked", 8)
WIDTHS = {"t.lora_A": 3, "t.lora_B": 5, "lm_head.lora_A": 3, "lm_head.lora_B": 4}


def factors(rank: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal((rank, width)).astype(np.float32) for name, width in WIDTHS.items()}


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_factors_of_any_rank_are_one_set(rank: int) -> None:
    given = factors(rank)
    sets = check_factors(given, SPEC)
    assert len(sets) == 1
    for name, array in sets.tensors.items():
        assert np.asarray(array).tolist() == [given[name].tolist()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [f], "factors hold a list: pass a dict"),
        (lambda f: {"x": f["t.lora_A"]}, r"factors hold \['x'\]: pass a dict"),
        (lambda f: f | {"more": f["t.lora_A"]}, "'more'"),
        (lambda f: f | {"t.lora_A": [[1.0], [1.0, 2.0]]}, "something else than arrays"),
        (lambda f: f | {"t.lora_A": f["t.lora_A"].astype(np.float64)}, r"^t\.lora_A has dtype float64"),
        (lambda f: f | {"t.lora_A": f["t.lora_A"][0]}, r"^t\.lora_A has shape \(3,\), expected \(rank, 3\)"),
        (lambda f: f | {"t.lora_A": f["t.lora_A"][:, :, None]}, r"^t\.lora_A has shape \(2, 3, 1\)"),
        (lambda f: f | {"t.lora_B": f["t.lora_B"][:, 1:]}, r"^t\.lora_B has shape \(2, 4\), expected \(rank, 5\)"),
        (lambda f: f | {"t.lora_B": f["t.lora_B"][:0]}, r"^t\.lora_B has shape \(0, 5\)"),
        (lambda f: f | {"t.lora_B": f["t.lora_B"] * np.float32("nan")}, r"^t\.lora_B holds NaN or infinity"),
        (lambda f: f | {"t.lora_B": f["t.lora_B"][:1]}, r"t\.lora_A has rank 2; t\.lora_B has rank 1; .*use one"),
    ],
)  # fmt: skip
def test_what_is_no_factor_set(change: Any, message: str) -> None:
    with pytest.raises(FactorsError, match=message):
        check_factors(change(factors(2)), SPEC)


def test_no_factors_are_zeros_of_rank_1() -> None:
    for name, array in no_factors(SPEC).tensors.items():
        assert np.asarray(array).tolist() == np.zeros((1, 1, WIDTHS[name])).tolist()


def test_stacked_sets_keep_their_order_and_are_padded_with_zeros() -> None:
    one, *pair, other = (check_factors(factors(rank, seed), SPEC) for seed, rank in enumerate((1, 3, 3, 2)))
    stacked = stack_sets([one, stack_sets(pair), other])
    assert len(stacked) == 4
    for name, array in stacked.tensors.items():
        values = np.asarray(array)
        assert values.shape == (4, 3, WIDTHS[name])
        for i, (rank, seed) in enumerate([(1, 0), (3, 1), (3, 2), (2, 3)]):
            assert values[i, :rank].tolist() == factors(rank, seed)[name].tolist()
            assert not values[i, rank:].any()


def test_sets_that_are_made_as_zeros_are_told_from_others() -> None:
    """Others may be zeros as well: nobody looks at their values."""
    nothing, own = no_factors(SPEC), check_factors(factors(2), SPEC)
    for sets in (nothing, zero_set(own), stack_sets([nothing, zero_set(own)]), nothing[np.array([0, 0])]):
        assert sets.updates_nothing
        assert sets.in_memory().updates_nothing
    for sets in (own, stack_sets([nothing, own]), own[np.array([0])], own.in_memory()):
        assert not sets.updates_nothing


def test_a_single_stack_is_not_copied() -> None:
    """It may be on a device."""
    stack = FactorSets({"t.lora_A": np.ones((2, 1, 3), np.float32)})
    assert stack_sets([stack]) is stack
