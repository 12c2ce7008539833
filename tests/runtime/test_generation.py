"""Generation: stopping, streaming, limits, rows that leave, seeds."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import InputError, TokenError
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.engine.batch import ContinuousBatch
from chameleon_deploy.runtime.generation import Generate, Generation, Row, Token, begin_rows
from chameleon_deploy.runtime.sampling import Choice, Sampler
from chameleon_deploy.runtime.tokenizer import load_tokenizer
from tests.rows import random_rows
from tests.shared_data import good_bundle

HOT = Sampling(temperature=1.2, seed=11)


def test_limits_are_per_row_and_rows_leave(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, limits = random_rows(1, 6, 20), [1, 7, 3, 12, 3, 5]
    together = runtime.generate(rows, max_new_tokens=limits, mode="request")
    assert [len(g.token_ids) for g in together] == limits
    assert {g.finish_reason for g in together} == {"length"}
    for row, limit in enumerate(limits):
        assert runtime.generate([rows[row]], max_new_tokens=limit, mode="request")[0] == together[row]
    batches, made = list[int](), list[tuple[int, int]]()
    step, slots = Slots.step, SharedCacheDecoder.slots

    def counted(self: Slots, ids: Any, factors: Any) -> Any:
        batches.append(len(ids))
        return step(self, ids, factors)

    def measured(self: SharedCacheDecoder, rows: int, capacity: int) -> Slots:
        made.append((rows, capacity))
        return slots(self, rows, capacity)

    monkeypatch.setattr(Slots, "step", counted)
    monkeypatch.setattr(SharedCacheDecoder, "slots", measured)
    runtime.generate(rows, max_new_tokens=limits)
    assert batches == [sum(limit > n for limit in limits) for n in range(1, 12)]
    assert made == [(6, max(len(ids) + limit for ids, limit in zip(rows, limits, strict=True)) - 1)]


def test_the_models_positions_end_a_row(runtime: Runtime) -> None:
    prompt = [int(i) for i in np.arange(128) % 500]
    assert len(runtime.generate([prompt], max_new_tokens=50)[0].token_ids) == 1
    assert len(runtime.generate([prompt[:120]], max_new_tokens=50)[0].token_ids) == 9


def test_the_end_of_text_token_stops(runtime: Runtime) -> None:
    """Raise the end-of-text logit by factors made for it: the row must end at once."""
    eos = runtime.manifest.model.eos_token_id
    prompt = [5, 6, 7]
    first = runtime.generate([prompt], max_new_tokens=4, sampling=Sampling(stop_token_ids=(eos,)))[0]
    assert first.finish_reason == "length"
    token = first.token_ids[1]
    stopped = runtime.generate([prompt], max_new_tokens=4, sampling=Sampling(stop_token_ids=(token,)))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == first.token_ids[: first.token_ids.index(token) + 1]
    assert stopped.text == runtime.tokenizer.decode(stopped.token_ids[:-1])


def test_a_stop_string_ends_the_text_before_it(runtime: Runtime) -> None:
    whole = runtime.generate(["The river"], max_new_tokens=24, sampling=HOT)[0]
    middle = whole.text[len(whole.text) // 2 :][:3]
    stopping = Sampling(temperature=1.2, seed=11, stop=("never there", middle))
    stopped = runtime.generate(["The river"], max_new_tokens=24, sampling=stopping)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(middle)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


@pytest.mark.parametrize("stop", [(), ("e",), ("zzzz", "th"), ("\n",)])
def test_a_stream_adds_up_to_the_generation(runtime: Runtime, stop: tuple[str, ...]) -> None:
    sampling = Sampling(temperature=1.2, seed=3, stop=stop)
    rows = random_rows(2, 5, 20)
    expected = runtime.generate(rows, max_new_tokens=20, sampling=sampling)
    texts: dict[int, str] = defaultdict(str)
    ids: dict[int, list[int]] = defaultdict(list)
    final: dict[int, Any] = {}
    for token in runtime.stream(rows, max_new_tokens=20, sampling=sampling):
        assert token.row not in final
        texts[token.row] += token.text
        ids[token.row].append(token.token_id)
        if token.generation is not None:
            final[token.row] = token.generation
    assert [final[row] for row in range(5)] == expected
    for row, generation in enumerate(expected):
        assert texts[row] == generation.text
        assert ids[row] == generation.token_ids


def test_a_stop_string_is_never_shown_in_part(runtime: Runtime) -> None:
    whole = runtime.generate(["x"], max_new_tokens=30, sampling=HOT)[0].text
    stop = whole[10:14]
    shown = ""
    for token in runtime.stream(["x"], max_new_tokens=30, sampling=Sampling(temperature=1.2, seed=11, stop=(stop,))):
        shown += token.text
        assert shown == whole[: len(shown)]
        assert stop not in shown
    assert shown == whole[: whole.index(stop)]


def characters(runtime: Runtime, text: str) -> list[int]:
    """One token for each letter of the text."""
    return [runtime.tokenizer.token_to_id(character) for character in text]


def shown_of(runtime: Runtime, ids: list[int], limit: int, **settings: Any) -> list[str]:
    """What a row shows with each of these tokens; the last of them ends it."""
    row = Row(0, [1], limit, Sampler(Sampling(**settings), [1], 0), 0)
    eos = runtime.manifest.model.eos_token_id
    tokens = [row.append(Choice(token_id), runtime.tokenizer, eos) for token_id in ids]
    assert [token.generation is not None for token in tokens] == [False] * (len(ids) - 1) + [True]
    assert tokens[-1].generation is not None
    assert "".join(token.text for token in tokens) == tokens[-1].generation.text
    return [token.text for token in tokens] + [tokens[-1].generation.finish_reason]


def test_the_beginning_of_a_stop_string_is_held_back(runtime: Runtime) -> None:
    ids = characters(runtime, "riverbed")
    assert len(ids) == 8
    stop = ("verb", "zzz")
    assert shown_of(runtime, ids[:6], 9, stop=stop) == ["r", "i", "", "", "", "", "stop"]
    assert shown_of(runtime, ids[:5], 5, stop=stop) == [
        "r",
        "i",
        "",
        "",
        "ver",
        "length",
    ]  # not a stop string after all
    other = characters(runtime, "rivets")
    assert shown_of(runtime, other, 6, stop=stop) == ["r", "i", "", "", "vet", "s", "length"]


def test_a_stop_string_is_found_in_what_a_cut_character_leaves(runtime: Runtime) -> None:
    """U+FFFD appears only when the row ends inside a character: at its limit, or by a stop token."""
    half = runtime.tokenizer.token_to_id("\u00c3")  # byte C3 in the alphabet of byte-level BPE
    ids = [*characters(runtime, "ab"), half]
    assert shown_of(runtime, ids, 3) == ["a", "b", "\ufffd", "length"]
    assert shown_of(runtime, ids, 3, stop=("\ufffd",)) == ["a", "b", "", "stop"]
    assert shown_of(runtime, ids, 3, stop=("b\ufffd",)) == ["a", "", "", "stop"]
    assert shown_of(runtime, [*ids, 9], 8, stop=("b\ufffd",), stop_token_ids=(9,)) == ["a", "", "", "", "stop"]


def test_ignore_eos_goes_on(runtime: Runtime) -> None:
    eos = runtime.manifest.model.eos_token_id
    ending = Sampling(logit_bias={eos: 100.0})
    assert runtime.generate([[5, 6]], max_new_tokens=3, sampling=ending)[0].token_ids == [eos]
    going = runtime.generate([[5, 6]], max_new_tokens=3, sampling=replace(ending, ignore_eos=True))[0]
    assert (going.token_ids, going.finish_reason) == ([eos] * 3, "length")
    stopping = replace(ending, ignore_eos=True, stop_token_ids=(eos,))
    assert runtime.generate([[5, 6]], max_new_tokens=3, sampling=stopping)[0].token_ids == [eos]


@pytest.mark.parametrize("sampling", [Sampling(logprobs=3), replace(HOT, logprobs=0, logit_bias={7: 4.0})])
def test_log_probabilities_are_those_that_score_gives(runtime: Runtime, sampling: Sampling) -> None:
    prompt = [5, 6, 7]
    tokens = list(runtime.stream([prompt], max_new_tokens=8, sampling=sampling, mode="none"))
    generation = tokens[-1].generation
    assert generation is not None
    assert generation.token_logprobs == [token.logprob for token in tokens]
    assert generation.top_logprobs == [token.top_logprobs for token in tokens]
    expected = runtime.score([prompt + generation.token_ids], mode="none")[0].token_logprobs[len(prompt) - 1 :]
    assert generation.token_logprobs == pytest.approx(expected, abs=1e-5)
    silent = runtime.generate([prompt], max_new_tokens=8, sampling=replace(sampling, logprobs=None), mode="none")[0]
    assert silent == replace(generation, token_logprobs=None, top_logprobs=None)
    for token in tokens:
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == sampling.logprobs
        if sampling.temperature == 0:
            assert token.top_logprobs[0] == (token.token_id, token.logprob)


def test_closing_a_stream_leaves_the_runtime_usable(runtime: Runtime) -> None:
    stream = runtime.stream(random_rows(4, 3, 10), max_new_tokens=50)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert runtime.generate([[1, 2]], max_new_tokens=2)


def test_seeds(runtime: Runtime) -> None:
    prompt = [9, 8, 7]
    a, again = (runtime.generate([prompt] * 2, max_new_tokens=12, sampling=HOT) for _ in range(2))
    assert a == again
    assert a[0].token_ids != a[1].token_ids  # rows of one Sampling draw from streams of their own
    other = runtime.generate([prompt], max_new_tokens=12, sampling=Sampling(temperature=1.2, seed=12))
    assert other[0].token_ids != a[0].token_ids
    # One Sampling per row: a row does not depend on its place in the batch.
    mine = Sampling(temperature=1.2, seed=77)
    placed = runtime.generate([[3], prompt, [4]], max_new_tokens=12, sampling=[HOT, mine, HOT], mode="request")
    assert placed[1] == runtime.generate([prompt], max_new_tokens=12, sampling=[mine], mode="request")[0]


def test_repetition_penalty_ends_repetition(runtime: Runtime) -> None:
    plain = runtime.generate([[5, 6, 7]], max_new_tokens=30)[0].token_ids
    penalised = runtime.generate([[5, 6, 7]], max_new_tokens=30, sampling=Sampling(repetition_penalty=5.0))[0].token_ids
    assert len(set(penalised)) > len(set(plain))


def test_half_a_character_at_the_end_is_shown_as_replacement(runtime: Runtime) -> None:
    """A row that ends inside a multi-byte character shows what the tokenizer decodes it to."""
    for seed in range(50):
        generation = runtime.generate([[5]], max_new_tokens=3, sampling=Sampling(temperature=3.0, seed=seed))[0]
        assert generation.text == runtime.tokenizer.decode(generation.token_ids)
        if generation.text.endswith("\ufffd"):
            return
    pytest.fail("no sample ended inside a character: the test needs other seeds")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": [1]}, "1 values of max_new_tokens for 2 prompts"),
        ({"sampling": [HOT]}, "1 values of sampling for 2 prompts"),
        ({"sampling": None}, "sampling is of type NoneType: pass"),
        ({"sampling": {"temperature": 1.0}}, "sampling is of type dict: pass"),
        ({"sampling": [HOT, None]}, "sampling is of type NoneType: pass"),
    ],
)
def test_bad_arguments(runtime: Runtime, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime.stream([[1], [2]], **arguments)


def test_a_bias_of_a_token_outside_the_vocabulary(runtime: Runtime) -> None:
    with pytest.raises(TokenError, match="logit_bias: token id 100000 "):
        runtime.stream([[1]], sampling=Sampling(logit_bias={100_000: 1.0}))


def test_key_value_memory_is_taken_over_when_nobody_has_it_and_not_before(runtime: Runtime) -> None:
    decoder = runtime.decoder
    assert isinstance(decoder, SharedCacheDecoder)
    first, second = decoder.slots(3, 30), decoder.slots(3, 30)
    assert not np.shares_memory(first._cache, second._cache)
    kept, shape = first._cache[:, 0], first._cache.shape
    address = first._cache.ctypes.data
    del first
    third = decoder.slots(2, 30)
    assert third._cache.ctypes.data == address
    assert third._cache.shape == (*shape[:1], 2, *shape[2:])
    assert decoder.slots(3, 30)._cache.ctypes.data != address
    del kept, second, third


def test_a_batch_of_64_ragged_rows(runtime: Runtime) -> None:
    rows = random_rows(64, 64, 120)
    generations = runtime.generate(rows, max_new_tokens=4, mode="request")
    for row in (0, 17, 63):
        assert runtime.generate([rows[row]], max_new_tokens=4, mode="request")[0] == generations[row]


GOOD = good_bundle("chameleon_masked")
TOKENIZER = load_tokenizer(GOOD / "tokenizer.json")
MODEL = open_bundle(GOOD).manifest.model
IDS = TOKENIZER.encode("aXbYc", add_special_tokens=False).ids


def appended(row: Row, ids: list[int]) -> list[Token]:
    return [row.append(Choice(token_id), TOKENIZER, MODEL.eos_token_id) for token_id in ids]


def row_of(sampling: Sampling, limit: int = len(IDS), is_shown: bool = True) -> Row:
    return Row(3, [5], limit, Sampler(sampling, [5], 0), 7, is_shown)


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_row_ends_at_its_limit(is_shown: bool) -> None:
    *before, last = appended(row_of(Sampling(), is_shown=is_shown), IDS)
    assert len(IDS) == 5
    assert [token.generation for token in before] == [None] * 4
    assert last.generation == Generation(IDS, "aXbYc", 7, "length")
    assert [token.text for token in (*before, last)] == (list("aXbYc") if is_shown else [""] * 4 + ["aXbYc"])
    assert [(token.row, token.token_id) for token in (*before, last)] == [(3, token_id) for token_id in IDS]


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [(("a",), "", 1), (("X", "a"), "", 1), (("Y",), "aXb", 4), (("YcZ", "c"), "aXbY", 5), (("bY",), "aX", 4),
     (("z",), "aXbYc", 5)],
)  # fmt: skip
@pytest.mark.parametrize("is_shown", [True, False])
def test_a_row_ends_before_its_first_stop_string(stop: tuple[str, ...], text: str, count: int, is_shown: bool) -> None:
    tokens = appended(row_of(Sampling(stop=stop), is_shown=is_shown), IDS[:count])
    assert [token.generation is None for token in tokens] == [True] * (count - 1) + [False]
    assert tokens[-1].generation == Generation(IDS[:count], text, 7, "length" if stop == ("z",) else "stop")
    assert "".join(token.text for token in tokens) == text


def test_the_longest_beginning_of_a_stop_string_is_held_back() -> None:
    row = row_of(Sampling(stop=["XbZ", "bYcd"]), limit=9)
    assert [token.text for token in appended(row, IDS)] == ["a", "", "", "X", ""]
    assert row.end("cancelled") == Token(3, -1, "bYc", Generation(IDS, "aXbYc", 7, "cancelled"))


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=9), max_size=4))
def test_what_is_held_back_is_what_may_begin_a_stop_string(text: str, stop: list[str]) -> None:
    ids = [TOKENIZER.token_to_id(character) for character in text]
    row, shown = row_of(Sampling(stop=stop), limit=99), ""
    for place, token_id in enumerate(ids):
        token = row.append(Choice(token_id), TOKENIZER, MODEL.eos_token_id)
        shown += token.text
        so_far = text[: place + 1]
        if any(string in so_far for string in stop):
            assert token.generation is not None
            assert shown == so_far[: min(so_far.index(string) for string in stop if string in so_far)]
            return
        beginnings = [n for string in stop for n in range(len(string)) if so_far.endswith(string[:n])]
        assert shown == so_far[: len(so_far) - max(beginnings, default=0)]


def test_a_token_costs_the_same_whatever_the_settings() -> None:
    """The longest stop strings, of which each token goes on with one and breaks it, and the longest lists."""
    stop = ["a" * place + "X" + "a" * (1023 - place) for place in range(0, 1024, 64)]
    largest = Sampling(1.0, stop=stop, stop_token_ids=range(1000, 2024), logit_bias=dict.fromkeys(range(300), 0.1))
    token_id, logits = TOKENIZER.token_to_id("a"), np.zeros(MODEL.vocab_size, np.float32)

    def seconds(sampling: Sampling) -> float:
        row = row_of(sampling, limit=4000)
        started = time.process_time()
        for _ in range(3000):
            row.sampler.choose(logits)
            row.append(Choice(token_id), TOKENIZER, MODEL.eos_token_id)
        return time.process_time() - started

    assert seconds(largest) < seconds(Sampling(1.0, stop=["b"], logit_bias={5: 0.1})) + 0.5  # 0.17 ms a token more


@pytest.mark.parametrize(
    ("sampling", "token_id", "stops"),
    [(Sampling(), MODEL.eos_token_id, True), (Sampling(ignore_eos=True), MODEL.eos_token_id, False),
     (Sampling(), IDS[1], False), (Sampling(stop_token_ids=[IDS[1]]), IDS[1], True)],
)  # fmt: skip
def test_a_stop_token_has_no_text(sampling: Sampling, token_id: int, stops: bool) -> None:
    last = appended(row_of(sampling), [IDS[0], token_id])[-1]
    assert last.generation == (Generation([IDS[0], token_id], "a", 7, "stop") if stops else None)


def test_special_tokens_have_no_text() -> None:
    row = row_of(Sampling(ignore_eos=True))
    assert [token.text for token in appended(row, [IDS[0], MODEL.eos_token_id, IDS[1]])] == ["a", "", "X"]


def free(sampling: Sampling) -> None:
    """The mask of a row whose text is free: none."""


def test_rows_of_prompts() -> None:
    prompts, cluster_ids, room = [[1], [2, 3]], np.array([4, 5]), MODEL.max_positions
    rows = begin_rows(prompts, cluster_ids, Generate([3, 999], n=2), MODEL, free)
    assert [(row.index, row.prompt, row.limit, row.cluster_id) for row in rows] == [
        (0, [1], 3, 4), (1, [1], 3, 4), (2, [2, 3], room - 1, 5), (3, [2, 3], room - 1, 5),
    ]  # fmt: skip
    assert [row.limit for row in begin_rows(prompts, cluster_ids, Generate(999), MODEL, free, capacity=10)] == [10, 9]
    tokens = appended(begin_rows(prompts, cluster_ids, Generate(9), MODEL, free)[0], IDS[:2])
    assert [token.text for token in tokens] == ["a", "X"]


@pytest.mark.parametrize(("one_for_all", "streams"), [(True, [0, 1, 2, 3, 4, 5]), (False, [0, 1, 2, 0, 1, 2])])
def test_streams_of_random_numbers(one_for_all: bool, streams: list[int]) -> None:
    sampling, logits = Sampling(9.0, seed=5), np.zeros(MODEL.vocab_size, np.float32)
    generate = Generate(9, sampling if one_for_all else [sampling] * 2, n=3)
    rows = begin_rows([[1], [2]], np.zeros(2, np.int64), generate, MODEL, free)
    expected = [Sampler(sampling, [], stream).choose(logits) for stream in streams]
    assert [row.sampler.choose(logits) for row in rows] == expected
    assert len(set(expected)) == len(set(streams))


def lines_of(runtime: Runtime, count: int) -> int:
    """Return how many lines of the package `generate` runs for so many prompts."""
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace if "chameleon_deploy" in frame.f_code.co_filename else None

    prompts = [[i % 200 + 2, 7] * 30 for i in range(count)]  # about 34 in a call
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        runtime.generate(prompts, max_new_tokens=1, mode="none")
    finally:
        sys.settrace(before)
    return lines


def test_the_work_for_a_row_does_not_grow_with_the_rows(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    lines_of(runtime, 2)  # what the first call prepares
    assert lines_of(runtime, 800) < 2.05 * lines_of(runtime, 400)
    unread = ContinuousBatch._unread
    monkeypatch.setattr(ContinuousBatch, "_unread", lambda batch: iter(list(unread(batch))))
    assert lines_of(runtime, 800) > 2.05 * lines_of(runtime, 400)
