"""The C++ tokenizer against Hugging Face `tokenizers`, for a small tokenizer of every kind.

CHAMELEON_EXAMPLES=100000 makes as many random strings of each; a run of the suite makes a few. `tests.cpp.tokenizers`
compares those of published models.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from chameleon_deploy.errors import ManifestError
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.tiny import train_tokenizer
from chameleon_deploy.runtime.tokenizer import load_tokenizer
from tests.cpp.tokenizers import (
    CODE_POINTS,
    NativeTokenizer,
    code_point_texts,
    random_rows,
    random_text,
    rows_that_differ,
    texts_that_differ,
)
from tests.damage import changed
from tests.shared_data import good_bundle
from tests.tokenizer_files import (
    BLOOM,
    CL100K,
    DEEPSEEK,
    GPT_2,
    GPT_4O,
    HOSTILE,
    KIMI,
    LLAMA_3,
    REFUSED,
    SPLIT,
    TAKEN,
)

EXAMPLES = int(os.environ.get("CHAMELEON_EXAMPLES", "300"))


@functools.cache
def _texts() -> tuple[str, ...]:
    return tuple(text for kind in KINDS for text in python_texts(kind, 200))


@functools.cache
def _byte_level() -> str:
    return str(train_tokenizer(list(_texts()), 2000).to_str())


def _bytes(*steps: Any, normalizer: Any = None, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE that splits in these steps first."""
    tokenizer = Tokenizer.from_str(_byte_level())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    model: Any = tokenizer.model
    model.ignore_merges = ignore_merges
    return tokenizer


@functools.cache
def _sentence_pieces() -> str:
    """BPE of characters with byte fallback, as SentencePiece makes it."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token=special[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(_texts(), trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)


def _fallback(normalizer: Any, pre_tokenizer: Any, decoder: Any, without: tuple[str, ...] = ()) -> Tokenizer:
    content = json.loads(_sentence_pieces())
    for token in without:
        del content["model"]["vocab"][token]
    content["model"]["vocab"] = {token: i for i, token in enumerate(content["model"]["vocab"])}
    tokenizer = Tokenizer.from_str(json.dumps(content | {"normalizer": None}))
    for part, value in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer), ("decoder", decoder)):
        if value is not None:
            setattr(tokenizer, part, value)
    return tokenizer


def _pieces(*end: Any) -> Any:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])


def _bert(lowercase: bool) -> Tokenizer:
    special = ["[UNK]", "[PAD]", "[CLS]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token=special[0]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    marks = [chr(p) for p in CODE_POINTS[:20000:9]]  # characters that the texts do not have
    trainer = trainers.WordPieceTrainer(
        vocab_size=9000, special_tokens=special, show_progress=False, initial_alphabet=marks
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _added() -> Tokenizer:
    tokenizer = Tokenizer.from_str(_byte_level())
    tokenizer.add_tokens([AddedToken("word", single_word=True), AddedToken("tok", normalized=True), "tokens", "é ü"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True), "\n\n\n", "\n\n"])
    return _in_templates(tokenizer)


def _in_templates(tokenizer: Tokenizer) -> Tokenizer:
    """Put special tokens before and after a text."""
    mask, tokens = ((token, tokenizer.token_to_id(token)) for token in ("<mask>", "tokens"))
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(),
        processors.TemplateProcessing("<mask> tokens $A tokens", special_tokens=[mask, tokens]),
    ])  # fmt: skip
    return tokenizer


def _added_after_normalizers() -> Tokenizer:
    tokenizer = _fallback(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, _pieces()
    )
    tokenizer.add_tokens([AddedToken("word", normalized=True), AddedToken("tok", normalized=False, lstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<mask>", normalized=True)])
    return tokenizer


def _first() -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def _always() -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme="always", split=True)


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


LLAMA_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: Tokenizer.from_str(_byte_level()),
    "added tokens": _added,
    "smollm": lambda: _bytes(pre_tokenizers.Digits(individual_digits=True), _split(GPT_2)),
    "digits together": lambda: _bytes(pre_tokenizers.Digits(individual_digits=False), _split(GPT_2)),
    "llama-3": lambda: _bytes(_split(LLAMA_3), ignore_merges=True),
    "qwen": lambda: _bytes(_split(LLAMA_3.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "gpt-4o": lambda: _bytes(_split(GPT_4O)),
    "cl100k": lambda: _bytes(_split(CL100K)),
    "deepseek": lambda: _bytes(_split(r"\p{N}{1,3}"), _split(r"[一-龥぀-ゟ\u30a0-ヿ]+"), _split(DEEPSEEK)),
    "kimi": lambda: _bytes(_split(KIMI)),
    "bloom": lambda: _bytes(_split(BLOOM)),
    "removed": lambda: _bytes(_split(r"\s", "removed"), _split(r"[a-e]", "merged_with_next")),
    "inverted": lambda: _bytes(_split(r"\p{L}+", "removed", invert=True), _split("e", "contiguous", invert=True)),
    "contiguous": lambda: _bytes(_split(r"\p{P}", "contiguous"), _split(r"\s", "merged_with_previous")),
    "normal forms": lambda: _bytes(
        _split(GPT_2),
        normalizer=normalizers.Sequence(
            [normalizers.Strip(), normalizers.NFKC(), normalizers.Replace(Regex(r"\p{P}+"), ".")]
        ),
    ),
    "llama-2": lambda: _fallback(LLAMA_2, None, _pieces(decoders.Strip(" ", 1, 0))),
    "llama-2, without some bytes": lambda: _fallback(LLAMA_2, None, _pieces(), without=("<0xC3>", "<0xE2>", "<0xF0>")),
    "llama-2, of today": lambda: _fallback(None, _first(), _pieces(decoders.Strip(" ", 1, 0))),
    "metaspace": lambda: _fallback(None, _always(), decoders.Metaspace()),
    "gemma": lambda: _fallback(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), _pieces()
    ),
    "added after normalizers": _added_after_normalizers,
    "bert": lambda: _bert(lowercase=True),
    "bert, cased": lambda: _bert(lowercase=False),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_encode_and_decode_agree(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    TOKENIZERS[kind]().save(str(file))
    random, prose = np.random.default_rng(11), list(_texts())
    texts = ["", *prose[::8], " " * 5000, "a" * 5000, "'" * 999, "\n" * 3000 + "a"]
    texts += code_point_texts(CODE_POINTS[hash_of(kind) % 8 :: 8])
    texts += [random_text(random, prose) for _ in range(EXAMPLES)]
    assert not [ascii(text[:200]) for text in texts_that_differ(file, texts)]
    rows = random_rows(random, load_tokenizer(file), EXAMPLES)
    half, other = map(load_tokenizer(file).token_to_id, "\u00c3\u00a9")  # in byte-level BPE, bytes of one character
    if half is not None and other is not None:
        rows += [[half] * count + [other] for count in range(1, 40)]
    assert not rows_that_differ(file, rows)


def hash_of(kind: str) -> int:
    return list(TOKENIZERS).index(kind)


def test_a_text_that_differs_is_found(tmp_path: Path) -> None:
    """The comparison is of the file's own steps: another pre-tokenizer shows."""
    file, other = tmp_path / "tokenizer.json", tmp_path / "other.json"
    TOKENIZERS["llama-3"]().save(str(file))
    TOKENIZERS["gpt-2"]().save(str(other))
    texts = ["def f(x):", "1234567"]
    expected = [encoding.ids for encoding in load_tokenizer(other).encode_batch(texts)]
    assert NativeTokenizer(file).encode(texts) != expected
    assert NativeTokenizer(other).encode(texts) == expected


@pytest.mark.parametrize("raw", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"ok \x80"])
def test_invalid_utf8_is_refused(raw: bytes) -> None:
    assert NativeTokenizer(good_bundle("chameleon_masked") / "tokenizer.json").encode([raw, b"a"])[0] is None


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_both_runtimes_refuse(change: dict[str, Any], tmp_path: Path) -> None:
    content = json.loads((good_bundle("chameleon_masked") / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed(content, **change)))
    with pytest.raises(ManifestError, match=r"tokenizer\.json"):
        load_tokenizer(file)
    with pytest.raises(ValueError, match="manifest_invalid"):
        NativeTokenizer(file).encode([])


@pytest.mark.parametrize("pattern", [*TAKEN, *HOSTILE], ids=ascii)
def test_both_runtimes_take_the_same_patterns(pattern: str, tmp_path: Path) -> None:
    content = json.loads((good_bundle("chameleon_masked") / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content | {"pre_tokenizer": SPLIT | {"pattern": {"Regex": pattern}}}))
    if pattern in TAKEN:
        assert not texts_that_differ(file, ["a-b &&A x\nab abc ABC 123 a\U0001f600", "ababc", "漢字abé"])
    else:
        with pytest.raises(ValueError, match="manifest_invalid"):
            NativeTokenizer(file).encode([])


@pytest.mark.parametrize("pattern", [GPT_2, LLAMA_3, GPT_4O, CL100K, DEEPSEEK], ids=["2", "3", "4o", "100k", "ds"])
def test_no_text_takes_more_than_linear_time(pattern: str, tmp_path: Path) -> None:
    """A hundred thousand equal characters, which a pattern of quadratic time reads for minutes."""
    file = tmp_path / "tokenizer.json"
    _bytes(_split(pattern)).save(str(file))
    tokenizer, native = load_tokenizer(file), NativeTokenizer(file)
    size = 100_000
    texts = [kind * size + "\u0378" for kind in (" ", "\n", "a", "A", "1", "'", "\u0301", "漢")]
    start = time.process_time()
    for text in texts:
        tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert time.process_time() - start < 20
    assert native.seconds(texts) < 20
