"""Figures that are accumulated in pieces and slices equal those of a plain computation on all positions at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from chameleon_deploy.runtime import Score
from chameleon_deploy.runtime.factors import FactorSets, RowFactors
from chameleon_deploy.verify.logit_figures import (
    LogitFigures,
    factor_difference,
    logit_scale,
    max_abs,
    percentile_interval,
    score_difference,
)

VOCAB = 9


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


@pytest.mark.parametrize("spread", [0.01, 20.0])  # of scale 1, and of a larger one
def test_figures_are_those_of_a_plain_computation(spread: float) -> None:
    random = np.random.default_rng(0)
    expected = (random.standard_normal((200, VOCAB)) * spread).astype(np.float32)
    actual = expected + (random.standard_normal((200, VOCAB)) * spread / 4).astype(np.float32)
    ids = random.integers(0, VOCAB, 200)
    figures = LogitFigures()
    for start, stop, text_end in ((0, 70, 70), (70, 199, 200), (199, 200, 200)):  # two texts: 70 positions, then 130
        following = ids[start + 1 : min(stop + 1, text_end)]
        figures.add(*map(torch.from_numpy, (actual[start:stop], expected[start:stop], following)))
    q, p = log_softmax(actual), log_softmax(expected)
    predicted = [i for i in range(200) if i not in (69, 199)]
    scale = max(1.0, math.sqrt(expected.astype(np.float64).var(1).mean()) / 4)
    highest = np.sort(expected, 1)
    gap = 0.05 * spread / scale
    clear = highest[:, -1] - highest[:, -2] > gap * scale
    same = actual.argmax(1) == expected.argmax(1)
    assert (figures.positions, figures.targets) == (200, 198)
    assert figures.max_abs == np.abs(actual - expected).max()
    assert figures.scale == pytest.approx(scale)
    assert (scale > 1) == (spread > 1)
    assert 0 < same[clear].sum() < clear.sum() < 200
    assert figures.top1(gap) == (clear.sum(), same[clear].sum())
    np.testing.assert_allclose(torch.cat(figures.kl), (np.exp(p) * (p - q)).sum(1), atol=1e-9)
    for nll, logprobs in zip(figures.nll, (q, p), strict=True):
        assert nll == pytest.approx(-sum(logprobs[i, ids[i + 1]] for i in predicted))
    assert logit_scale([expected[:70], expected[70:]]) == pytest.approx(scale)


def test_a_gap_that_is_not_exceeded_is_not_clear() -> None:
    figures = LogitFigures()
    logits = torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.75, 0.0]])
    figures.add(logits, logits, torch.empty(0, dtype=torch.int64))
    assert (figures.scale, figures.top1(0.5)) == (1.0, (1, 1))


def test_the_largest_difference() -> None:
    assert max_abs([0.25, -0.5], [0.0, 0.0]) == 0.5
    assert max_abs([], []) == 0.0
    assert math.isnan(max_abs([1.0, math.nan], [0.0, 0.0]))


def row_factors(factor_ids: list[int], *sets: list[float]) -> RowFactors:
    stack = np.array(sets, np.float32)[:, None]
    return RowFactors(FactorSets({"t.lora_A": stack, "t.lora_B": stack * 0}), np.array(factor_ids))


def test_factors_are_compared_row_by_row_relative_to_the_largest() -> None:
    theirs = row_factors([0, 1, 0], [1.0, -4.0], [2.0, 0.5])
    assert factor_difference(row_factors([1, 0, 1], [2.0, 0.5], [1.0, -4.0]), theirs) == 0.0
    assert factor_difference(row_factors([1, 0, 1], [2.0, 0.5], [1.0, -3.0]), theirs) == 0.25
    assert factor_difference(row_factors([0, 1, 1], [1.0, -4.0], [2.0, 0.5]), theirs) == 4.5 / 4
    nothing, little = row_factors([0], [0.0, 0.0]), row_factors([0], [0.0, 0.5])
    assert factor_difference(little, nothing) == 0.5  # of zeros there is no share
    with pytest.raises(ValueError, match="argument"):
        factor_difference(theirs, nothing)


def test_scores_are_compared_with_the_log_softmax_of_their_texts() -> None:
    logits = np.random.default_rng(0).standard_normal((4, VOCAB)).astype(np.float32)
    ids = [3, 1, 8, 2]
    logprobs = [float(log_softmax(logits)[i, ids[i + 1]]) for i in range(3)]
    one = Score([5], [], 0), logits[:1]
    assert score_difference([Score(ids, logprobs, 0), one[0]], [logits, one[1]]) == pytest.approx(0, abs=1e-6)
    logprobs[2] += 0.5
    assert score_difference([one[0], Score(ids, logprobs, 0)], [one[1], logits]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="argument"):
        score_difference([one[0]], [])


def test_an_interval_holds_the_quantile_of_its_population_as_often_as_it_says() -> None:
    """And little more often: of 2,000 samples of a known distribution."""
    random, held = np.random.default_rng(0), 0
    for _ in range(2000):
        low, high = percentile_interval(torch.from_numpy(random.exponential(size=300)), 0.9)
        held += low <= -math.log(1 - 0.9) <= (math.inf if high is None else high)
    assert 0.94 <= held / 2000 <= 0.97


def test_few_values_do_not_bound_a_high_quantile() -> None:
    values = torch.arange(1000, dtype=torch.float64)
    assert percentile_interval(values, 0.999) == (996, None)  # exp(-1): nothing above the largest would be no wonder
    assert percentile_interval(torch.arange(4000, dtype=torch.float64), 0.999)[1] == 3999
    assert percentile_interval(values.flip(0), 0.5) == percentile_interval(values, 0.5) == (468, 531)
    assert percentile_interval(torch.tensor([3.0]), 0.999) == (3, None)
