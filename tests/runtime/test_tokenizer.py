"""Which tokenizer.json and which patterns are taken, and what becomes of an error while a row is decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from chameleon_deploy.errors import InputError, ManifestError, RequestError
from chameleon_deploy.runtime.tokenizer import (
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

FILE = good_bundle("chameleon_masked") / "tokenizer.json"
GOOD = json.loads(FILE.read_text())
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (  # with possessive repetition
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = r"[\p{Han}]+|[\p{Lu}\p{Lt}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lo}&&[^\p{Han}]]*|\p{N}{1,3}|\s+"
BLOOM = r" ?[^(\s|[.,!?…。\uff0c、।\u06d4،])]+"  # a class in a class
TAKEN = [GPT_2, LLAMA_3, GPT_4O, CL100K, DEEPSEEK, KIMI, BLOOM, r"a|b", r"[^\n]", r"\u0041\x{1F600}+", "(ab?){2}c",
         r"a.b+c|a.b+", r"[a&&b]", "[-a]", "[a-]", r"(?:ab|c)?d"]  # fmt: skip
HOSTILE = [
    "(a+)+b", "(a|a)*b", r"(a*)*", r"\s+$", "a+b", r"\s*[\r\n]+", "a*", "a+?b", "^a", r"(a)\1", "(?<=a)b", "(?i:ss)",
    r"(?i:\p{Lu})", r"\w+", r"\h", r"[[:alpha:]]+", "a{0,100}a{0,100}b", "", "a||b", "(", ")", "[", "[a", "\\",
    "[z-a]", "[]", "[a&&]", "[&&a]", r"\s*x|\s*", "a+b*c|a+", "a(?!bc)", "(?!a)b", r"\s+(?!\S)", "(?:(a))", "a" * 1025,
    "a{1,2}{3}", "a{,3}", "a{0}", "a{2,1}", "a{99999}", "(a){4}", r"\p{Foo}", r"\p{^L}", r"\x41", r"\x{110000}",
    r"\ud800", "[a-\\s]", "[[a[b]]]", "(?P<n>a)", "(?#c)", "a**", r"[\p{L}--]", r"\Aa", "(?>a)",
]  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}
REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
FIRST = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True}
REFUSED: list[dict[str, Any]] = [
    {"normalizer": {"type": "NFD"}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 33}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 65}},
    {"normalizer": {"type": "Sequence", "normalizers": [REPLACE | {"content": "aaaa"}] * 4}},
    {"normalizer": REPLACE | {"pattern": {"String": ""}}},
    {"normalizer": REPLACE | {"pattern": {"String": "a", "Regex": "a"}}},
    {"normalizer": REPLACE | {"pattern": {"Regex": "a*"}}},
    {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": "Digits"}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, FIRST]}},
    {"pre_tokenizer": FIRST | {"replacement": "__"}},
    {"pre_tokenizer": FIRST, "normalizer": {"type": "NFC"}},
    {"pre_tokenizer": SPLIT | {"behavior": "isolated"}},
    {"post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}},
    {"decoder": None},
    {"decoder": {"type": "CTC"}},
    {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}},
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}},
    {"model__unk_token": "no token"},
    {"model__end_of_word_suffix": "</w>"},
    {"model__dropout": 0.1},
    {"model__vocab__!": 2},
    {"model__vocab__!": None},  # of which `tokenizers` panics
    {"added_tokens": [{"id": 9, "content": "new", "single_word": False, "lstrip": False, "rstrip": False,
                       "normalized": False, "special": False}]},
]  # fmt: skip


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
    assert shown == [""] * (MAX_PENDING - 1) + [REPLACEMENT * MAX_PENDING]


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
