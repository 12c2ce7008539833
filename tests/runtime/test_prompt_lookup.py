"""Speculative decoding by prompt lookup: the same tokens as plain decoding, in fewer calls."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy import Engine, Runtime, Sampling
from chameleon_deploy.errors import ChameleonError, InputError, NumericError, ProviderError
from chameleon_deploy.runtime.decode.prompt_lookup import MATCHED_TOKENS, PromptLookup
from chameleon_deploy.runtime.decode.slots import Slots
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
    draft, step = Slots.draft, Slots.step

    def counted(self: Slots, row: int, token_ids: Any, factors: Any) -> Any:
        widths.append(len(token_ids))
        return draft(self, row, token_ids, factors)

    def counted_step(self: Slots, token_ids: Any, factors: Any) -> Any:
        widths.append(1)
        return step(self, token_ids, factors)

    monkeypatch.setattr(Slots, "draft", counted)
    monkeypatch.setattr(Slots, "step", counted_step)
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
    monkeypatch.setattr(Slots, "cut", lambda self, row, length: None)
    stream = runtime.stream([REPEATING], max_new_tokens=60, prompt_lookup_num_tokens=4)
    assert [token.token_id for token in islice(stream, 10)] != plain.token_ids[:10]


def test_decoders_that_would_read_other_tokens_are_refused(int8_runtime: Runtime, portable: Runtime) -> None:
    refused: list[tuple[Runtime, type[ChameleonError], str]] = [
        (int8_runtime, InputError, "in int8 a call of several tokens rounds"), (portable, ProviderError, "'cpu' only"),
    ]  # fmt: skip
    for runtime, error, message in refused:
        with Engine(runtime) as engine:
            for call in (runtime.generate, runtime.stream, engine.submit):
                with pytest.raises(error, match=message) as found:
                    call([REPEATING], prompt_lookup_num_tokens=4)
                assert found.value.argument == "prompt_lookup_num_tokens"


def test_several_rows_draft_when_one_is_left(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, limits = [REPEATING, random_rows(3, 1, 30)[0]], [60, 5]
    plain = runtime.generate(prompts, max_new_tokens=limits)
    widths = count_calls(runtime, monkeypatch)
    assert runtime.generate(prompts, max_new_tokens=limits, prompt_lookup_num_tokens=8) == plain
    assert max(widths[:4]) == 1
    assert max(widths) > 1
    assert len(widths) < 50


def test_the_engine_drafts_for_a_row_that_is_alone(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its tokens, one by one or several at a time, are those of plain decoding."""
    plain = runtime.generate([REPEATING], max_new_tokens=60, sampling=SAMPLINGS[0])
    widths = count_calls(runtime, monkeypatch)
    with Engine(runtime, rows=4, prefill_tokens=8) as engine:
        how: Any = {"max_new_tokens": 60, "sampling": SAMPLINGS[0], "prompt_lookup_num_tokens": 8}
        stream = engine.submit([REPEATING], **how)
        tokens = list(stream)
        assert stream.result() == plain
        assert [token.token_id for token in tokens] == plain[0].token_ids
        assert max(widths) > 1
        streams = [engine.submit([prompt], **how) for prompt in (REPEATING, random_rows(3, 1, 30)[0], [5])]
        together = [stream.result(60)[0] for stream in streams]
        until = [runtime.generate([prompt], **{**how, "prompt_lookup_num_tokens": 0})[0] for prompt in
                 (REPEATING, random_rows(3, 1, 30)[0], [5])]  # fmt: skip
        assert together == until


def test_a_row_that_is_not_finite_ends(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Slots.draft

    def broken(self: Slots, row: int, token_ids: Any, factors: Any) -> Any:
        values = draft(self, row, token_ids, factors).copy()
        values[-1] = np.nan
        return values

    monkeypatch.setattr(Slots, "draft", broken)
    ended = runtime.generate([REPEATING], max_new_tokens=30, prompt_lookup_num_tokens=4, errors="row")[0]
    assert ended.finish_reason == "error"
    assert isinstance(ended.error, NumericError)
    with pytest.raises(NumericError):
        runtime.generate([REPEATING], max_new_tokens=30, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "from 0 to 16, got -1"), (17, "got 17"), ("4", "must be an integer"), (1.5, "must be an integer")],
)
def test_values_out_of_range_are_refused(runtime: Runtime, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime.stream([[1, 2]], prompt_lookup_num_tokens=value)


def test_the_stream_is_the_generation(runtime: Runtime) -> None:
    tokens = list(runtime.stream([REPEATING], max_new_tokens=20, prompt_lookup_num_tokens=6))
    assert tokens[-1].generation == runtime.generate([REPEATING], max_new_tokens=20)[0]
