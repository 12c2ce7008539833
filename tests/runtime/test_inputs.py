"""Mistakes in the types of arguments are InputErrors that say what to pass, and cost nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

import chameleon_deploy
from chameleon_deploy import Generate, Runtime
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import ChameleonError, InputError, LengthError, TokenError
from chameleon_deploy.runtime.inputs import (
    MAX_ROWS,
    MAX_THREADS,
    check_integer,
    check_number,
    check_threads,
    encode,
    integer,
    is_sequence,
    per_prompt,
)
from chameleon_deploy.runtime.tokenizer import load_tokenizer
from tests.shared_data import good_bundle

PROMPTS = ["one", "two"]


@pytest.mark.parametrize(
    "value", [2.5, "3", None, True, [1, 2.0], ["1", "2"], [1], np.array([1.0, 2.0]), {"a": 1}, b"ab"]
)
def test_max_new_tokens(runtime: Runtime, value: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        runtime.generate(PROMPTS, max_new_tokens=value)


@pytest.mark.parametrize("value", [np.int64(2), np.uint8(2), [2, np.int32(2)], np.array([2, 2]), (2, 2)])
def test_every_kind_of_integer_is_taken(runtime: Runtime, value: Any) -> None:
    assert runtime.generate(PROMPTS, max_new_tokens=value) == runtime.generate(PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize("tenants", [[["a"], ["b"]], [("a", []), "b"], [{}, {}], "ab", b"ab", 5, {"a", "b"}])
def test_tenants(runtime: Runtime, tenants: Any) -> None:
    with pytest.raises(InputError, match="tenant"):
        runtime.adapt(PROMPTS, mode="tenant", tenants=tenants)


def test_tenants_that_are_equal_and_of_different_types_share_no_factors(runtime: Runtime) -> None:
    adaptation = runtime.adapt(["same"] * 4, mode="tenant", tenants=[1, True, 1.0, 1])
    assert adaptation.factors.factor_ids.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "texts", [[[1, [2]]], [[[1, 2], [3]]], [[1.5]], [[None]], [{"a": 1}], [5], [[2**70]], [[True]], [object()], [[1j]]]
)
def test_token_ids(runtime: Runtime, texts: Any) -> None:
    with pytest.raises(InputError, match="neither a string nor a list of integers"):
        runtime.score(texts)


@pytest.mark.parametrize("threads", [0, -1, 2**40, 1_000_000, 1.5, "2", True])
def test_threads(bundle: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="threads"):
        chameleon_deploy.load(bundle, threads=threads)


@pytest.mark.parametrize("path", [5, None, b"x", ["x"]])
def test_a_path(path: Any) -> None:
    with pytest.raises(InputError, match="path"):
        chameleon_deploy.load(path)


def test_sessions_check_threads_too(bundle: Path) -> None:
    from chameleon_deploy.runtime.decode.session import open_session

    opened = open_bundle(bundle)
    with pytest.raises(InputError, match="threads must be from 1 to 1024"):
        open_session(opened, opened.manifest.graphs["decoder_cpu"], 2**40)


GOOD = good_bundle("chameleon_masked")
MODEL = open_bundle(GOOD).manifest.model


def test_texts_become_token_ids_with_the_special_tokens_around_them() -> None:
    tokenizer = load_tokenizer(GOOD / "tokenizer.json")
    plain = [encoding.ids for encoding in tokenizer.encode_batch(["one", "two"])]
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert encode(["one", "two"], tokenizer, MODEL) == [[0, *ids] for ids in plain]
    assert encode(["one", "two"], tokenizer, MODEL, add_special_tokens=False) == plain
    assert encode([""], tokenizer, MODEL) == [[0]]
    assert encode(plain, tokenizer, MODEL) == plain


def test_token_ids_at_their_limits() -> None:
    last, longest = MODEL.vocab_size - 1, MODEL.max_positions
    for rows in ([[0]], [[last, 0]], [[1] * longest, [2]], [np.array([1, 2], np.uint8)], [range(3)]):
        assert encode(rows, None, MODEL) == [list(row) for row in rows]
    wrong: list[tuple[Any, type[ChameleonError], str]] = [
        ("one", InputError, "a single str"), (5, InputError, "a single int"), ([], InputError, "the batch is empty"),
        (["one", [1]], InputError, "mixes"), ([[1], []], InputError, "text 1 is empty"),
        ([[1, 0, -1]], TokenError, "token id -1 is outside"),
        ([[0, last, last + 1]], TokenError, f"token id {last + 1} is outside"),
        ([[1], [1] * (longest + 1)], LengthError, f"text 1 has {longest + 1} tokens"),
        ([np.array([[1]])], InputError, "neither"), ([[1, [2, 3]]], InputError, "text 0 is neither"),
        ([np.array(["a"])], InputError, "neither"),
    ]  # fmt: skip
    for texts, error, message in wrong:
        with pytest.raises(error, match=message):
            encode(texts, None, MODEL)
    with pytest.raises(InputError, match="text 1 holds a lone surrogate"):
        encode(["one", "\udc80"], load_tokenizer(GOOD / "tokenizer.json"), MODEL)


def test_integers_at_their_limits() -> None:
    assert [check_integer("x", value, 1, 3) for value in (1, np.int8(3))] == [1, 3]
    assert check_integer("x", 2**63 - 1, 0) == 2**63 - 1
    for value, least, most in ((0, 1, 3), (4, 1, 3), (2**63, 0, 2**63 - 1)):
        with pytest.raises(InputError, match=f"x must be an integer from {least} to {most}, got {value}"):
            check_integer("x", value, least, most)
    with pytest.raises(InputError, match=str(2**63 - 1)):
        check_integer("x", 2**63, 0)
    for wrong in (True, np.True_, 1.0, "1", None):
        with pytest.raises(InputError, match="x must be an integer"):
            integer("x", wrong)


def test_numbers_at_their_limits() -> None:
    assert [check_number("x", value, 0) for value in (0, 0.5, np.float32(2), math.inf)] == [0, 0.5, 2, math.inf]
    for wrong in (-5e-324, math.nan, True, "1", None, 10**400):
        with pytest.raises(InputError, match="x must be a number of at least 0"):
            check_number("x", wrong, 0)


def test_limits_of_threads_and_rows() -> None:
    assert [check_threads(value) for value in (None, 1, 1024)] == [None, 1, 1024]
    assert (MAX_THREADS, MAX_ROWS) == (1024, 65536)
    for wrong in (0, 1025):
        with pytest.raises(InputError, match="threads must be from 1 to 1024"):
            check_threads(wrong)


def test_one_limit_of_new_tokens_or_one_per_row() -> None:
    assert per_prompt("x", 1, 3) == [1, 1, 1]
    assert per_prompt("x", [1, 5], 2) == per_prompt("x", np.array([1, 5]), 2) == [1, 5]
    with pytest.raises(InputError, match="1 values of x for 2"):
        per_prompt("x", [1], 2)
    for wrong in ([1, 0], 0):
        with pytest.raises(InputError, match="at least 1, got 0"):
            Generate(wrong)


def test_what_holds_several_values() -> None:
    assert all(map(is_sequence, ([], [1], (1,), range(2), np.array([1]), np.zeros((2, 2)))))
    assert not any(map(is_sequence, ("ab", b"ab", 5, None, {1}, {1: 2}, np.array(5), iter([1]))))
