"""Which tokenizer.json and which patterns are taken, and what becomes of an error while a row is decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from chameleon_deploy.errors import InputError, ManifestError, RequestError
from chameleon_deploy.runtime.tokenizer import (
    MAX_INCOMPLETE,
    MAX_PENDING,
    REPLACEMENT,
    DecodeStream,
    decode,
    encode_batch,
    load_tokenizer,
)
from chameleon_deploy.runtime.tokenizer_pattern import pattern_fault
from tests.damage import changed
from tests.shared_data import good_bundle
from tests.tokenizer_files import HOSTILE, REFUSED, SPLIT, TAKEN

FILE = good_bundle("chameleon_masked") / "tokenizer.json"
GOOD = json.loads(FILE.read_text())


def load(directory: Path, **changes: Any) -> Any:
    """Load the good file after changes."""
    (directory / "tokenizer.json").write_text(json.dumps(changed(GOOD, **changes)))
    return load_tokenizer(directory / "tokenizer.json")


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_what_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """The C++ runtime refuses the same, see tests/cpp/test_cpp_tokenizer.py."""
    with pytest.raises(ManifestError, match=r"tokenizer\.json"):
        load(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace.*no runtime has this"),
        ({"model__unk_token": "?!"}, r"model\.unk_token: '\?!' is not in the vocabulary"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a+)+b"}}}, r"pre_tokenizer: pattern '\(a\+\)\+b' repeats"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}, "use_regex"),
    ],
)
def test_a_fault_says_where(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=message):
        load(tmp_path, **changes)


def test_what_is_supported(tmp_path: Path) -> None:
    plain, step = load_tokenizer(FILE), SPLIT | {"pattern": {"Regex": "[0-9]"}}
    assert load(tmp_path, model__dropout=0.0).encode("a 12").ids == plain.encode("a 12").ids
    split = load(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": [step, GOOD["pre_tokenizer"]]})
    assert decode(split, split.encode("a 12").ids) == "a 12"


@pytest.mark.parametrize("pattern", TAKEN, ids=ascii)
def test_patterns_that_are_taken(pattern: str) -> None:
    assert pattern_fault(pattern) is None


@pytest.mark.parametrize("pattern", HOSTILE, ids=ascii)
def test_patterns_that_are_refused(pattern: str) -> None:
    assert pattern_fault(pattern)


def test_a_text_that_is_given_up_is_bad_input() -> None:
    """Oniguruma counts its steps back and `tokenizers` panics; the gate keeps such patterns out."""
    tokenizer = load_tokenizer(FILE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    with pytest.raises(InputError, match="cannot be split into words"):
        encode_batch(tokenizer, ["a" * 40])


def test_special_tokens_have_no_text() -> None:
    tokenizer = load_tokenizer(FILE)
    assert decode(tokenizer, [0, *tokenizer.encode("a", add_special_tokens=False).ids, 0]) == "a"


def test_a_token_that_completes_no_character_has_no_text_yet() -> None:
    tokenizer, stream = load_tokenizer(FILE), DecodeStream()
    ids = tokenizer.encode("\N{SNOWMAN}", add_special_tokens=False).ids
    assert [stream.step(tokenizer, token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["\N{SNOWMAN}"]
    assert len(ids) > 1


def test_a_stream_waits_for_a_bounded_number_of_tokens() -> None:
    tokenizer, stream = load_tokenizer(FILE), DecodeStream()
    half = tokenizer.token_to_id("\u00c3")  # byte C3 in the alphabet of byte-level BPE
    shown = [stream.step(tokenizer, half) for _ in range(MAX_PENDING)]
    assert shown == [""] * (MAX_PENDING - 1) + [REPLACEMENT * (MAX_PENDING - MAX_INCOMPLETE)]


@pytest.mark.parametrize("halves", range(1, 2 * MAX_PENDING + 4))
def test_a_character_is_whole_however_long_the_stream_waited_before_it(halves: int) -> None:
    tokenizer, stream = load_tokenizer(FILE), DecodeStream()
    half, other = map(tokenizer.token_to_id, "\u00c3\u00a9")  # bytes C3 and A9: together an e with an acute accent
    ids = [*[half] * halves, other]
    text = "".join(stream.step(tokenizer, token_id) for token_id in ids)
    assert text == decode(tokenizer, ids) == REPLACEMENT * (halves - 1) + "\u00e9"


def test_what_was_shown_stays() -> None:
    """An invalid byte makes bytes before it invalid, in byte fallback: the text goes on behind what was shown."""
    tokenizer = Tokenizer(models.BPE({"<0x41>": 0, "<0xC3>": 1, "x": 2}, []))
    tokenizer.decoder, stream = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), DecodeStream()
    assert [stream.step(tokenizer, token_id) for token_id in (0, 1, 2)] == ["A", "", REPLACEMENT + "x"]
    assert decode(tokenizer, [0, 1, 2]) == 2 * REPLACEMENT + "x"
    theirs = decoders.DecodeStream(skip_special_tokens=True)
    theirs.step(tokenizer, 0), theirs.step(tokenizer, 1)
    with pytest.raises(Exception, match="Invalid prefix"):  # why the stream is not that of `tokenizers`
        theirs.step(tokenizer, 2)


class Panic(BaseException):
    """As `tokenizers` raises it: no Exception."""


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def decode(self, *_: Any, **__: Any) -> str:
        raise self.error


@pytest.mark.parametrize("error", [Panic("x"), ValueError("x"), OverflowError("x")])
def test_a_failure_is_the_rows_error(error: BaseException) -> None:
    with pytest.raises(RequestError, match="cannot decode this row: x"):
        decode(Failing(error), [1])
    with pytest.raises(RequestError, match="cannot decode this row: x"):
        DecodeStream().step(Failing(error), 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), MemoryError()])
def test_what_ends_the_process_passes(error: BaseException) -> None:
    with pytest.raises(type(error)):
        decode(Failing(error), [1])
    with pytest.raises(type(error)):
        DecodeStream().step(Failing(error), 1)
