"""Sampling does what its specification says, compared with a plain transcription of it."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import InputError, NumericError, TokenError
from chameleon_deploy.runtime import sampling as implementation
from chameleon_deploy.runtime.sampling import Sampler, TokenCounts, choose, log_probabilities, uniform
from chameleon_deploy.runtime.sampling_settings import Sampling, check_sampling
from tests.plain_sampling import plain_choose, plain_log_probabilities, weight

NOTHING = TokenCounts([])
LOGITS = st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=2, max_size=30)


def floats(values: Any) -> FloatArray:
    return np.asarray(values, np.float32)


@given(
    logits=LOGITS,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([0.0, -0.4, 1.1]),
    frequency=st.sampled_from([0.0, 0.3, -2.0]),
    u=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
@settings(max_examples=400, deadline=None)
def test_choose_is_its_specification(
    logits: list[float], temperature: float, top_k: int, top_p: float, repetition: float, presence: float,
    frequency: float, u: float, data: st.DataObject,
) -> None:  # fmt: skip
    ids = st.integers(0, len(logits) - 1)
    prompt, generated = data.draw(st.lists(ids, min_size=1, max_size=5)), data.draw(st.lists(ids, max_size=5))
    bias = data.draw(st.dictionaries(ids, st.floats(-100, 100), max_size=3))
    masks = st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(any)
    allowed = data.draw(st.none() | masks)
    sampling = Sampling(
        temperature, top_k, top_p, repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    mask = None if allowed is None else np.array(allowed)
    chosen = choose(floats(logits), TokenCounts(prompt, generated), sampling, u, mask)
    assert chosen == plain_choose(logits, prompt, generated, sampling, u, allowed)


@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.0, 0.01, 1.0, 8.0]), top_p=st.floats(0.001, 0.999))
@settings(max_examples=60, deadline=None)
def test_top_p_by_selection_equals_top_p_by_sorting(seed: int, spread: float, top_p: float) -> None:
    random = np.random.default_rng(seed)
    logits = floats(random.standard_normal(3000) * spread).round(int(random.integers(1, 7)))
    weights = implementation._weights(logits, float(logits.max()), 1.0)
    order = np.lexsort((np.arange(3000), -weights))
    count = int(np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum())) + 1
    kept = implementation._top_p(weights, top_p)
    assert kept is not None
    assert kept.tolist() == sorted(order[:count])


@given(weights=st.lists(st.integers(0, 6).map(float), min_size=1, max_size=40).filter(any), top_p=st.integers(1, 19))
@settings(max_examples=200, deadline=None)
def test_top_p_of_small_weights(weights: list[float], top_p: int) -> None:
    """Most are ties, and sums of some are just what is enough."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    enough = top_p / 20 * sum(weights)
    count = next(n for n in range(1, len(order) + 1) if sum(weights[i] for i in order[:n]) >= enough)
    kept = implementation._top_p(np.array(weights), top_p / 20)
    assert kept is not None
    assert kept.tolist() == sorted(order[:count])


@pytest.mark.parametrize("error", [0.5, 1.0])
@pytest.mark.parametrize("top_p", [0.45, 0.9])  # the first or the second is the last that is kept
def test_weights_whose_order_errors_could_change(top_p: float, error: float) -> None:
    def kept(apart: float) -> list[int] | None:
        ids = implementation._top_p(np.array([10, 1000, 1000 + apart]), top_p, error)
        return None if ids is None else ids.tolist()

    assert kept(2 * error) is None
    assert kept(2.25 * error) == ([2] if top_p < 0.5 else [1, 2])


@pytest.mark.parametrize(("top_p", "certain"), [(0.43, False), (0.45, True), (0.65, True), (0.67, False)])
def test_a_sum_that_errors_could_bring_to_what_is_enough(top_p: float, certain: bool) -> None:
    kept = implementation._top_p(np.array([1000.0, 4000, 2000, 3000]), top_p, 100.0)  # each sum is off by up to 400
    assert (kept is not None) == certain


@pytest.mark.parametrize(
    ("place", "bound", "certain"),
    [(0, 2, False), (0, 3, True), (0, 7, True), (0, 8, False), (1, 12, False), (1, 13, True), (1, 17, True),
     (1, 18, False), (2, 23, False)],
)  # fmt: skip
def test_a_place_is_certain_further_than_the_margin_from_two_sums(place: int, bound: float, certain: bool) -> None:
    assert implementation._is_certain(0.0, np.array([10.0, 20.0]), place, bound, 2.0) is certain


def choices_beside_a_bound(top_p: float, error: float) -> list[tuple[int | None, int | None]]:
    """What weights with errors of up to one unit choose, and exact ones, where u is close to a running sum."""
    random, found = np.random.default_rng(0), []
    for _ in range(400):
        logits = floats(random.standard_normal(1000) * random.choice([1, 3, 6])).round(3)
        weights = implementation._weights(logits, float(logits.max()), 1.0)
        kept = np.arange(1000) if top_p == 1 else implementation._top_p(weights, top_p)
        sums = np.cumsum(weights[kept])
        u = float(
            np.clip((random.choice(sums) + random.normal() * 10 ** random.uniform(-1, 3)) / sums[-1], 0, 1 - 2.0**-53)
        )
        wrong = np.maximum(weights + random.uniform(-1, 1, 1000), 0)
        found.append((
            implementation._choose_place(wrong, top_p, u, error), implementation._choose_place(weights, top_p, u)
        ))  # fmt: skip
    return found


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_weights_with_errors_choose_as_exact_ones_or_not_at_all(top_p: float) -> None:
    chosen = choices_beside_a_bound(top_p, 1.0)
    assert all(exact is not None and place in (None, exact) for place, exact in chosen)
    assert any(place is not None for place, _ in chosen)
    trusted = choices_beside_a_bound(top_p, 1e-9)  # the check notices errors that are larger than was said
    assert any(place not in (None, exact) for place, exact in trusted)


@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0.0, 1.0, 8.0]), temperature=st.sampled_from([0.01, 1, 9]))
@settings(max_examples=30, deadline=None)
def test_exponentials_differ_from_weights_by_less_than_the_bound(seed: int, spread: float, temperature: float) -> None:
    logits = floats(np.random.default_rng(seed).standard_normal(3000) * spread)
    highest = float(logits.max())
    exact = implementation._weights(logits, highest, temperature)
    assert np.abs(implementation._exponentials(logits, highest, temperature) - exact).max() < 0.6


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_choice_that_errors_could_change_is_made_by_exact_weights(
    top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = floats(np.random.default_rng(3).standard_normal(500))
    numbers = [uniform(0, 0, step) for step in range(50)]
    chosen = [choose(logits, NOTHING, Sampling(1.0, top_p=top_p), u) for u in numbers]
    monkeypatch.setattr(implementation, "_ERROR", 1e12)
    assert [choose(logits, NOTHING, Sampling(1.0, top_p=top_p), u) for u in numbers] == chosen
    monkeypatch.setattr(implementation, "_weights", lambda *_: np.ones(500))
    assert [choose(logits, NOTHING, Sampling(1.0, top_p=top_p), u) for u in numbers] != chosen


@given(seed=st.integers(0, 2**32), size=st.integers(1, 1100), u=st.floats(0, 1, exclude_max=True))
@settings(max_examples=100, deadline=None)
def test_a_draw_by_blocks_equals_a_draw_by_running_sums(seed: int, size: int, u: float) -> None:
    random = np.random.default_rng(seed)
    weights = np.floor(2.0 ** random.uniform(-3, 34, size)) * (random.random(size) < 0.5)
    weights[random.integers(size)] = 2.0**34
    sums = np.cumsum(weights)
    for number in (u, 0.0, 1 - 2.0**-53):
        assert implementation._draw(weights, number) == np.flatnonzero(sums > number * sums[-1])[0]


def test_weights_are_integers_close_to_the_exponential_function() -> None:
    x = -np.linspace(0, 30, 20_001, dtype=np.float32)
    weights = implementation._weights(x, 0.0, 1.0)
    assert weights.tolist() == [weight(float(value), 0.0, 1.0) for value in x]
    assert weights[0] == 2**34
    assert np.array_equal(weights, np.rint(weights))
    assert np.abs(weights - 2.0**34 * np.exp(x.astype(np.float64))).max() <= 1
    assert not weights[x < -24.3].any()


def test_the_sum_of_weights_does_not_depend_on_their_order() -> None:
    random = np.random.default_rng(0)
    weights = implementation._weights(floats(random.standard_normal(2**19)), 0.0, 1e5)
    assert weights.sum() > 2**52
    assert weights.sum() == np.cumsum(weights)[-1] == np.cumsum(random.permutation(weights))[-1] == math.fsum(weights)


def test_choose_leaves_the_logits_alone() -> None:
    logits = np.array([1.0, 2.0, -3.0], np.float32)
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 3.0})
    choose(logits, TokenCounts([1], [2]), sampling, 0.5, np.array([True, True, False]))
    log_probabilities(logits, 0, 3)
    assert logits.tolist() == [1.0, 2.0, -3.0]


def test_uniform_is_splitmix64() -> None:
    """The published first outputs of SplitMix64 for seed 1234567 (Rosetta Code, java.util.SplittableRandom)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(1234567, 0, step) for step in range(4)] == [(x >> 11) * 2.0**-53 for x in published]
    assert uniform(1234567, 1, 0) == uniform(1234567, 0, 2**32)


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    draws = [choose(logits, NOTHING, Sampling(temperature=1.0), uniform(7, 3, i)) for i in range(20_000)]
    np.testing.assert_allclose(np.bincount(draws) / len(draws), [0.1, 0.2, 0.3, 0.4], atol=0.015)


def test_presence_and_frequency_count_generated_tokens_alone() -> None:
    logits = floats([2.0, 1.9, 1.0])
    presence, frequency = Sampling(presence_penalty=0.5), Sampling(frequency_penalty=0.04)
    assert choose(logits, TokenCounts([0, 0, 0]), presence, 0.0) == 0
    assert choose(logits, TokenCounts([], [0]), presence, 0.0) == 1
    assert choose(logits, TokenCounts([0, 0, 0], [0, 0]), frequency, 0.0) == 0
    assert choose(logits, TokenCounts([], [0, 0, 0]), frequency, 0.0) == 1
    assert choose(logits, TokenCounts([0]), Sampling(repetition_penalty=1.2), 0.0) == 1


@pytest.mark.parametrize(
    ("sampling", "chosen"),
    [
        (Sampling(), 0),
        (Sampling(repetition_penalty=2.0), 1),
        (Sampling(presence_penalty=1.0), 1),
        (Sampling(frequency_penalty=1.0), 1),
        (Sampling(logit_bias={2: 2.0}), 2),
        (Sampling(1.0, top_k=1), 0),
        (Sampling(1.0, top_k=1, presence_penalty=1.0), 1),
    ],
)  # fmt: skip
def test_a_setting_alone_changes_the_choice(sampling: Sampling, chosen: int) -> None:
    assert choose(floats([2.0, 1.9, 1.0]), TokenCounts([], [0]), sampling, 0.999) == chosen


def test_what_is_the_highest_raw_logit_for_any_row() -> None:
    assert Sampler(Sampling(), [], 0).is_argmax
    for sampling in (
        Sampling(temperature=1.0), Sampling(temperature=0.5), Sampling(repetition_penalty=2.0), Sampling(logprobs=0),
        Sampling(presence_penalty=1.0), Sampling(frequency_penalty=1.0), Sampling(logit_bias={0: 0.0}),
    ):  # fmt: skip
        assert not Sampler(sampling, [], 0).is_argmax


def test_logits_far_below_the_highest_have_no_weight() -> None:
    """The polynomial of step 6 would be infinite there."""
    logits = floats([0.0, -6000.0, -1e30, -np.inf])
    assert implementation._weights(logits, 0.0, 1.0).tolist() == [2.0**34, 0, 0, 0]
    assert {choose(logits, NOTHING, Sampling(1.0), u) for u in (0.0, 0.5, 1 - 2.0**-53)} == {0}


def test_a_mask_excludes_tokens_whatever_their_bias() -> None:
    logits, sampling = floats([0.0, 5.0, 1.0]), Sampling(logit_bias={1: 100.0})
    assert choose(logits, NOTHING, sampling, 0.0, np.array([True, False, True])) == 2
    draws = {
        choose(logits, NOTHING, Sampling(temperature=9.0), uniform(0, 0, i), np.array([True, False, True]))
        for i in range(200)
    }
    assert draws == {0, 2}
    with pytest.raises(InputError, match="allow at least one"):
        choose(logits, NOTHING, sampling, 0.0, np.zeros(3, bool))


def test_a_sampler_is_choose_with_its_own_state() -> None:
    logits, sampling = floats([1.0, 1.1, 0.9, 1.2]), Sampling(1.0, frequency_penalty=0.8, seed=5, logprobs=2)
    sampler, generated = Sampler(sampling, [0], stream=3), list[int]()
    for step in range(20):
        choice = sampler.choose(logits)
        assert choice == sampler.choose(logits)  # nothing is counted yet
        token_id = choose(logits, TokenCounts([0], generated), sampling, uniform(5, 3, step))
        assert choice == log_probabilities(logits, token_id, 2)
        sampler.append(token_id)
        generated.append(token_id)
    assert len(set(generated)) == 4


@given(logits=LOGITS, count=st.integers(0, 5), data=st.data())
@settings(max_examples=200, deadline=None)
def test_log_probabilities_are_the_log_softmax(logits: list[float], count: int, data: st.DataObject) -> None:
    token_id = data.draw(st.integers(0, len(logits) - 1))
    choice = log_probabilities(floats(logits), token_id, count)
    expected = plain_log_probabilities(logits, count)
    assert choice.top_logprobs is not None
    assert choice.logprob is not None
    assert [id_ for id_, _ in choice.top_logprobs] == [id_ for id_, _ in expected]
    for (_, actual), (_, wanted) in zip(choice.top_logprobs, expected, strict=True):
        assert actual == np.float32(actual)
        assert actual == pytest.approx(wanted, abs=2e-6, rel=1e-7)
    assert dict(choice.top_logprobs).get(token_id, choice.logprob) == choice.logprob
    best = log_probabilities(floats(logits), int(np.argmax(logits)), 1)
    assert best.logprob == max(logprob for _, logprob in best.top_logprobs or ())


def test_log_probabilities_of_a_vocabulary() -> None:
    """The bound that the specification gives: 50,257 logits, as wide and as flat as those of a model."""
    for spread in (0.1, 2.0, 10.0):
        logits = floats(np.random.default_rng(1).standard_normal(50_257) * spread - 100)
        for actual, wanted in zip(
            log_probabilities(logits, 0, 5).top_logprobs or (), plain_log_probabilities(logits.tolist(), 5), strict=True
        ):
            assert actual[0] == wanted[0]
            assert actual[1] == pytest.approx(wanted[1], abs=2e-7, rel=1e-7)


def test_a_token_of_no_probability_is_not_listed() -> None:
    choice = log_probabilities(floats([-np.inf, 3.0, -np.inf]), 1, 5)
    assert choice == (1, 0.0, ((1, 0.0),))
    assert log_probabilities(floats([-np.inf, 3.0]), 0, 0).logprob == -np.inf
    assert {choose(floats([-np.inf, 3.0]), NOTHING, Sampling(5.0), u) for u in (0.0, 0.5, 0.999)} == {1}


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": 1j},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e39},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.5},
        {"stop": ("",)},
        {"stop": "text"},
        {"stop": (1,)},
        {"stop": 1},
        {"stop_token_ids": (1.5,)},
        {"stop_token_ids": "1"},
        {"stop_token_ids": (-1,)},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {5: 101.0}},
        {"logit_bias": {5: None}},
        {"logit_bias": 5},
        {"ignore_eos": 1},
        {"logprobs": 21},
        {"logprobs": -1},
        {"logprobs": True},
    ],
)
def test_settings_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(bad))}=.*: pass "):
        Sampling(**bad)


FLOAT32 = np.finfo(np.float32)


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("temperature", [0, 1e-5, np.finfo(np.float64).max], [np.nextafter(1e-5, 0), -5e-324]),
        ("top_k", [0, 2**63 - 1], [-1, 2**63, True]),
        ("top_p", [5e-324, 1], [0, np.nextafter(1, 2), True]),
        ("repetition_penalty", [float(FLOAT32.smallest_normal), float(FLOAT32.max)],
         [np.nextafter(float(FLOAT32.smallest_normal), 0), np.nextafter(float(FLOAT32.max), np.inf)]),
        ("seed", [0, 2**64 - 1], [-1, 2**64]),
        ("presence_penalty", [-2, 2], [np.nextafter(-2, -3), np.nextafter(2, 3)]),
        ("frequency_penalty", [-2, 2], [np.nextafter(-2, -3), np.nextafter(2, 3)]),
        ("logprobs", [None, 0, 20], [-1, 21]),
        ("ignore_eos", [True, False, np.True_], [1, 0, None]),
    ],
)  # fmt: skip
def test_settings_at_their_limits(name: str, accepted: list[Any], refused: list[Any]) -> None:
    for value in accepted:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(InputError, match=f"^{name}="):
            Sampling(**{name: value})


def test_token_ids_and_biases_at_their_limits() -> None:
    ids, biases = (0, 2**63 - 1), ((0, -100.0), (2**63 - 1, 100.0))
    assert Sampling(stop_token_ids=ids).stop_token_ids == ids
    assert Sampling(logit_bias=dict(biases)).logit_bias == biases
    for token_id in (-1, 2**63, True):
        with pytest.raises(InputError):
            Sampling(stop_token_ids=[token_id])
        with pytest.raises(InputError):
            Sampling(logit_bias={token_id: 0.0})
    for bias in (np.nextafter(-100, -101), np.nextafter(100, 101)):
        with pytest.raises(InputError):
            Sampling(logit_bias={0: bias})


def test_the_default_is_the_highest_logit_and_nothing_else() -> None:
    assert dataclasses.astuple(Sampling()) == (0.0, 0, 1.0, 1.0, 0, (), (), 0.0, 0.0, (), False, None, None)


def test_numbers_of_numpy_are_numbers() -> None:
    numbers: Any = [np.float32(0.5), np.int32(3), np.float64(0.5), 1, np.uint64(2**64 - 1), [np.int64(4)]]
    more: Any = {"logit_bias": {np.int64(7): np.float32(1.5)}, "logprobs": np.int8(2)}
    sampling = Sampling(*numbers, **more)
    assert sampling == Sampling(0.5, 3, 0.5, 1.0, 2**64 - 1, (4,), logit_bias={7: 1.5}, logprobs=2)
    assert type(sampling.seed) is int
    assert type(sampling.temperature) is float


def test_a_sampling_is_a_value() -> None:
    bias = {9: 1.0, 3: -1.0}
    sampling = Sampling(stop=["a"], logit_bias=bias)
    bias[3] = 5.0
    assert sampling.logit_bias == ((3, -1.0), (9, 1.0))
    assert {sampling, copy.deepcopy(sampling), pickle.loads(pickle.dumps(sampling))} == {sampling}  # noqa: S301
    assert dataclasses.replace(sampling, seed=0) == sampling


def test_what_a_vocabulary_decides() -> None:
    check_sampling(Sampling(logit_bias={319: 1.0}), 320)
    with pytest.raises(TokenError, match="logit_bias: token id 320 "):
        check_sampling(Sampling(logit_bias={320: 1.0}), 320)
    for other in (None, {"temperature": 1.0}):
        with pytest.raises(InputError, match=f"of type {type(other).__name__}: pass"):
            check_sampling(other, 320)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(logit_bias={1: -100.0})])
@pytest.mark.parametrize("allowed", [None, np.array([True, False, True])])
def test_logits_that_are_not_finite(value: float, sampling: Sampling, allowed: Any) -> None:
    logits = floats([0.0, value, 1.0])
    for bad in (logits, np.full(3, -np.inf, np.float32)):
        with pytest.raises(NumericError):
            choose(bad, NOTHING, sampling, 0.5, allowed)
        with pytest.raises(NumericError):
            log_probabilities(bad, 0, 1)


def test_a_penalty_that_overflows_is_found() -> None:
    with pytest.raises(NumericError):
        choose(floats([3e38, 0.0]), TokenCounts([0]), Sampling(repetition_penalty=1e-30), 0.5)
