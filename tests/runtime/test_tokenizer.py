"""Which tokenizer.json is taken, and what becomes of an error while a row is decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream

from chameleon_deploy.errors import ManifestError, RequestError
from chameleon_deploy.runtime.tokenizer import decode, decode_next, load_tokenizer
from tests.damage import changed
from tests.shared_data import good_bundle

FILE = good_bundle("chameleon_masked") / "tokenizer.json"
GOOD = json.loads(FILE.read_text())
BYTE_LEVEL = GOOD["pre_tokenizer"]
DIGITS = {"type": "Digits", "individual_digits": True}


def load(directory: Path, **changes: Any) -> Any:
    """Load the good file after changes."""
    (directory / "tokenizer.json").write_text(json.dumps(changed(GOOD, **changes)))
    return load_tokenizer(directory / "tokenizer.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model is not of type BPE"),
        ({"model__type": "WordPiece"}, "model is not of type BPE"),
        ({"decoder": None}, "decoder is not of type ByteLevel"),
        ({"decoder": {"type": "Fuse"}}, "decoder is not of type ByteLevel"),
        ({"truncation": {}}, "truncation is not supported"),
        ({"padding": {}}, "padding is not supported"),
        ({"model__dropout": 0.1}, "model.dropout is not supported"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is not supported"),
        ({"model__unk_token": "?"}, "model.unk_token is not supported"),
        ({"model__ignore_merges": True}, "model.ignore_merges is not supported"),
        ({"pre_tokenizer": None}, "neither ByteLevel nor"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither ByteLevel nor"),
        ({"pre_tokenizer": {"type": "Sequence"}}, "a Sequence other than Digits"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS]}}, "a Sequence other than Digits"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL, BYTE_LEVEL]}},
         "a Sequence other than Digits"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, BYTE_LEVEL]}},
         "a Sequence other than Digits"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS | {"individual_digits": False}, BYTE_LEVEL]}},
         "a Sequence other than Digits"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, DIGITS]}}, "neither ByteLevel nor"),
        ({"pre_tokenizer__use_regex": False}, "use_regex=false is not supported"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}},
         "missing required field `use_regex`"),
        ({"unknown": 1}, "unknown"),
    ],
)  # fmt: skip
def test_what_is_not_supported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=message):
        load(tmp_path, **changes)


def test_what_is_supported(tmp_path: Path) -> None:
    plain = load_tokenizer(FILE)
    assert load(tmp_path, model__dropout=0.0).encode("a 12").ids == plain.encode("a 12").ids
    digits = load(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]})
    assert decode(digits, digits.encode("a 12").ids) == "a 12"


def test_special_tokens_have_no_text() -> None:
    tokenizer = load_tokenizer(FILE)
    assert decode(tokenizer, [0, *tokenizer.encode("a", add_special_tokens=False).ids, 0]) == "a"


def test_a_token_that_completes_no_character_has_no_text_yet() -> None:
    tokenizer, stream = load_tokenizer(FILE), DecodeStream(skip_special_tokens=True)
    ids = tokenizer.encode("\N{SNOWMAN}", add_special_tokens=False).ids
    assert [decode_next(stream, tokenizer, token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["\N{SNOWMAN}"]
    assert len(ids) > 1


class Panic(BaseException):
    """As `tokenizers` raises it: no Exception."""


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def decode(self, *_: Any, **__: Any) -> str:
        raise self.error

    step = decode


@pytest.mark.parametrize("error", [Panic("x"), ValueError("x"), OverflowError("x")])
def test_a_failure_is_the_rows_error(error: BaseException) -> None:
    with pytest.raises(RequestError, match="cannot decode this row: x"):
        decode(Failing(error), [1])
    with pytest.raises(RequestError, match="cannot decode this row: x"):
        decode_next(Failing(error), None, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), MemoryError()])
def test_what_ends_the_process_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        decode(Failing(error), [1])
    with pytest.raises(type(error)):
        decode_next(Failing(error), None, 1)
