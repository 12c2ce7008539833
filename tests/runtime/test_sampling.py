"""Sampling does what its docstring specifies, compared with a slow transcription of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy.errors import InputError, NumericError
from chameleon_deploy.runtime.sampling import Sampling, choose, uniform


def transcription(logits: list[float], seen: list[int], s: Sampling, u: float) -> int:
    values = [np.float32(v) for v in logits]
    if s.repetition_penalty != 1.0:
        penalty = np.float32(s.repetition_penalty)
        for i in set(seen):
            values[i] = values[i] / penalty if values[i] > 0 else values[i] * penalty
    best = max(range(len(values)), key=lambda i: (values[i], -i))
    if s.temperature == 0:
        return best
    z = [float(v) / s.temperature for v in values]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    if s.top_k:
        order = order[: s.top_k]
    w = {i: math.exp(z[i] - z[best]) for i in order}
    if s.top_p < 1:
        total = 0.0
        for i in order:
            total += w[i]
        running, kept = 0.0, []
        for i in order:
            kept.append(i)
            running += w[i]
            if running >= s.top_p * total:
                break
        order = kept
    last = 0.0
    for i in sorted(order):
        last += w[i]
    running = 0.0
    for i in sorted(order):
        running += w[i]
        if running > u * last:
            return i
    return max(order)


@given(
    logits=st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=2, max_size=30),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    u=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
@settings(max_examples=400, deadline=None)
def test_choose_is_its_specification(
    logits: list[float], temperature: float, top_k: int, top_p: float, penalty: float, u: float, data: st.DataObject
) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), min_size=1, max_size=5))
    sampling = Sampling(temperature, top_k, top_p, penalty)
    chosen = choose(np.array(logits, np.float32), np.unique(seen), sampling, u)
    assert chosen == transcription(logits, seen, sampling, u)


def test_choose_leaves_the_logits_alone() -> None:
    logits = np.array([1.0, 2.0, -3.0], np.float32)
    choose(logits, np.array([1]), Sampling(repetition_penalty=2.0), 0.5)
    assert logits.tolist() == [1.0, 2.0, -3.0]


def test_uniform_is_splitmix64() -> None:
    """The published first outputs of SplitMix64 for seed 1234567 (Rosetta Code, java.util.SplittableRandom)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(1234567, 0, step) for step in range(4)] == [(x >> 11) * 2.0**-53 for x in published]
    assert uniform(1234567, 1, 0) == uniform(1234567, 0, 2**32)


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    draws = [choose(logits, np.array([0]), Sampling(temperature=1.0), uniform(7, 3, i)) for i in range(20_000)]
    np.testing.assert_allclose(np.bincount(draws) / len(draws), [0.1, 0.2, 0.3, 0.4], atol=0.015)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
        {"stop": ("",)},
        {"stop": "text"},
    ],
)
def test_settings_out_of_range(bad: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(value: float, temperature: float) -> None:
    with pytest.raises(NumericError):
        choose(np.array([0.0, value, 1.0], np.float32), np.array([0]), Sampling(temperature), 0.5)
