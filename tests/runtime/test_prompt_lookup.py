"""Speculative decoding by prompt lookup: the same tokens as plain decoding, in fewer calls."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.errors import InputError, NumericError, ProviderError
from chameleon_deploy.runtime.logits import HostLogits
from chameleon_deploy.runtime.prompt_lookup import MATCHED_TOKENS, PromptLookup
from chameleon_deploy.runtime.shared_cache import SharedCacheDecoder
from tests.rows import random_rows

REPEATING = [7, 8, 9, 10, 11] * 6
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.5, seed=5),
    Sampling(temperature=1.5, top_p=0.9, seed=6, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=2),
]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 6))
def test_a_draft_is_what_followed_the_longest_suffix_last(ids: list[int], limit: int) -> None:
    expected: list[int] = []
    for length in MATCHED_TOKENS:
        ends = [end for end in range(length, len(ids)) if ids[end - length : end] == ids[-length:]]
        if ends and len(ids) >= length:
            expected = ids[ends[-1] :][:limit]
            break
    assert PromptLookup(ids).draft(limit) == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft_tokens", [1, 4, 16])
@pytest.mark.parametrize("mode", ["none", "request"])
def test_tokens_equal_those_of_plain_decoding(
    runtime: Runtime, sampling: Sampling, draft_tokens: int, mode: Any
) -> None:
    for prompt in (REPEATING, random_rows(3, 1, 30)[0], [5]):
        plain = runtime.generate([prompt], max_new_tokens=60, sampling=sampling, mode=mode)[0]
        found = runtime.generate(
            [prompt], max_new_tokens=60, sampling=sampling, mode=mode, prompt_lookup_num_tokens=draft_tokens
        )[0]
        assert (found.token_ids, found.text, found.finish_reason) == (plain.token_ids, plain.text, plain.finish_reason)
        if plain.token_logprobs is not None:
            assert found.token_logprobs == pytest.approx(plain.token_logprobs, abs=1e-4)


def test_a_row_ends_where_plain_decoding_ends_it(runtime: Runtime) -> None:
    plain = runtime.generate([REPEATING], max_new_tokens=40)[0]
    token = plain.token_ids[20]
    stopping = Sampling(stop_token_ids=(token,))
    assert (
        runtime.generate([REPEATING], max_new_tokens=40, sampling=stopping, prompt_lookup_num_tokens=8)
        == runtime.generate([REPEATING], max_new_tokens=40, sampling=stopping)
    )  # fmt: skip
    full = REPEATING * 4  # 120 of the model's 128 positions
    assert (
        runtime.generate([full], max_new_tokens=50, prompt_lookup_num_tokens=16)
        == runtime.generate([full], max_new_tokens=50)
    )  # fmt: skip
    for limit in (1, 2, 3):
        found = runtime.generate([REPEATING], max_new_tokens=limit, prompt_lookup_num_tokens=16)[0]
        assert found.token_ids == plain.token_ids[:limit]


def count_calls(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the width of every call after the prompt."""
    widths: list[int] = []
    extend = SharedCacheDecoder.extend

    def counted(self: SharedCacheDecoder, token_ids: Any, *rest: Any) -> HostLogits:
        widths.append(len(token_ids))
        return extend(self, token_ids, *rest)

    monkeypatch.setattr(SharedCacheDecoder, "extend", counted)
    return widths


def test_text_that_repeats_itself_takes_fewer_calls(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = count_calls(runtime, monkeypatch)
    found = runtime.generate([REPEATING], max_new_tokens=60, prompt_lookup_num_tokens=8)[0]
    assert len(found.token_ids) == 60
    assert 1 < max(widths) <= 9
    assert len(widths) < 40  # a greedy model of random weights ends in a loop, which the lookup finds


def test_a_wrong_draft_changes_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runtime.generate([REPEATING], max_new_tokens=30)[0]
    widths = count_calls(runtime, monkeypatch)
    monkeypatch.setattr(PromptLookup, "draft", lambda self, limit: [1, 2, 3, 4][:limit])
    assert runtime.generate([REPEATING], max_new_tokens=30, prompt_lookup_num_tokens=4)[0] == plain
    assert max(widths) == 5


def test_a_cache_that_keeps_a_rejected_draft_is_noticed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the fault that the tests above are for: positions that go on after a rejected draft."""
    plain = runtime.generate([REPEATING], max_new_tokens=30)[0]
    monkeypatch.setattr(PromptLookup, "draft", lambda self, limit: [1, 2, 3, 4][:limit])
    extend = SharedCacheDecoder.extend

    def faulty(self: SharedCacheDecoder, token_ids: Any, past: int, factors: Any, cache: Any) -> HostLogits:
        return extend(self, token_ids, int(cache.lengths[0]), factors, cache)

    monkeypatch.setattr(SharedCacheDecoder, "extend", faulty)
    stream = runtime.stream([REPEATING], max_new_tokens=60, prompt_lookup_num_tokens=4)
    assert [token.token_id for token in islice(stream, 10)] != plain.token_ids[:10]


def test_int8_gives_the_same_tokens_in_every_run(int8_runtime: Runtime) -> None:
    arguments: Any = {"max_new_tokens": 60, "sampling": SAMPLINGS[1], "prompt_lookup_num_tokens": 4}
    assert int8_runtime.generate([REPEATING], **arguments) == int8_runtime.generate([REPEATING], **arguments)


def test_a_row_that_is_not_finite_ends(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = SharedCacheDecoder.extend

    def broken(self: SharedCacheDecoder, token_ids: Any, *rest: Any) -> HostLogits:
        values = np.asarray(extend(self, token_ids, *rest)).copy()
        values[-1] = np.nan
        return HostLogits(values)

    monkeypatch.setattr(SharedCacheDecoder, "extend", broken)
    ended = runtime.generate([REPEATING], max_new_tokens=30, prompt_lookup_num_tokens=4, errors="row")[0]
    assert ended.finish_reason == "error"
    assert isinstance(ended.error, NumericError)
    with pytest.raises(NumericError):
        runtime.generate([REPEATING], max_new_tokens=30, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "from 0 .off. to 16, got -1"), (17, "got 17"), ("4", "must be an integer"), (1.5, "must be an integer")],
)
def test_values_out_of_range_are_refused(runtime: Runtime, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime.stream([[1, 2]], prompt_lookup_num_tokens=value)


def test_several_prompts_and_other_decoders_are_refused(runtime: Runtime, portable: Runtime) -> None:
    with pytest.raises(InputError, match="for a single prompt, got 2"):
        runtime.stream([[1], [2]], prompt_lookup_num_tokens=4)
    with pytest.raises(ProviderError, match="'cpu' only"):
        portable.stream([[1]], prompt_lookup_num_tokens=4)


def test_the_stream_is_the_generation(runtime: Runtime) -> None:
    tokens = list(runtime.stream([REPEATING], max_new_tokens=20, prompt_lookup_num_tokens=6))
    assert tokens[-1].generation == runtime.generate([REPEATING], max_new_tokens=20)[0]
