"""The C++ tokenizer against Hugging Face `tokenizers`, on texts of every kind and code points of every plane."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from chameleon_deploy.contract.bundle import FileSpec, Manifest, file_sha256
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.tiny import train_tokenizer
from tests.cpp.c_interface import NativeError, NativeRuntime

TEXTS = 100_000
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", "don't", "we'll've", "'"]
EMOJI = ["👍", "👍🏽", "👨‍👩‍👧‍👦", "🇩🇪", "1️⃣", "❤️", "🏴\U000e0067\U000e0062\U000e007f", "🫨"]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n ",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u2028",
    "\x85",
    "\x1c",
    "\u200b",
    "\ufeff",
]
SPECIAL = [
    "<|endoftext|>",
    "<|endoftext|",
    "<|endoftext|>" * 2,
    "<mask>",
    " <mask>  ",
    "word",
    "aworda",
    "tok",
    "tokens",
]


def with_tokenizer(bundle: Path, tokenizer: Tokenizer, out: Path) -> Path:
    """The bundle with another tokenizer: its ids need not fit the model, nothing is run."""
    shutil.copytree(bundle, out)
    tokenizer.save(str(out / "tokenizer.json"))
    manifest = msgspec.json.decode((out / "bundle.json").read_bytes(), type=Manifest)
    size = (out / "tokenizer.json").stat().st_size
    files = manifest.files | {"tokenizer.json": FileSpec(size, file_sha256(out / "tokenizer.json"))}
    (out / "bundle.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)))
    return out


def make_tokenizer(kind: str) -> Tokenizer:
    tokenizer: Tokenizer = train_tokenizer([text for kind in KINDS for text in python_texts(kind)[:300]], 3000)
    if kind == "added":
        tokenizer.add_tokens(
            [AddedToken("word", single_word=True), AddedToken("tok", normalized=True), "tokens", "é ü"]
        )
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    if kind.startswith("digits"):
        tokenizer.pre_tokenizer = digits_apart(add_prefix_space=kind == "digits after a space")
    return tokenizer


def digits_apart(add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    """As in SmolLM."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)]
    )


def random_text(random: np.random.Generator, prose: list[str]) -> str:
    parts = []
    for _ in range(random.integers(1, 8)):
        kind = random.integers(0, 9)
        if kind == 0:
            start = int(random.integers(0, 2000))
            parts.append(prose[random.integers(len(prose))][start : start + 60])
        elif kind == 1:
            parts.append(str(random.choice(CONTRACTIONS)))
        elif kind == 2:
            parts.append(str(random.choice(EMOJI)))
        elif kind == 3:
            parts.append(str(random.choice(SPACES)) * int(random.integers(1, 12)))
        elif kind == 4:
            parts.append(str(random.integers(0, 10 ** random.integers(1, 18))))
        elif kind == 5:
            parts.append(str(random.choice(SPECIAL)))
        elif kind == 6:
            parts.append("".join(map(chr, random.integers(0, 0x250, random.integers(1, 10)))))
        elif kind == 7:
            plane = int(random.integers(0, 17)) << 16
            points = plane + random.integers(0, 0x10000, random.integers(1, 6))
            parts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
        else:
            block = int(random.integers(0, 0x30)) << 8  # one script at a time
            parts.append("".join(map(chr, block + random.integers(0, 0x100, random.integers(1, 12)))))
    return "".join(parts)


@pytest.mark.parametrize("kind", ["plain", "added", "digits", "digits after a space"])
def test_encode_and_decode_agree(mini_bundles: dict[str, Path], tmp_path: Path, kind: str) -> None:
    expected = make_tokenizer(kind)
    native = NativeRuntime(with_tokenizer(mini_bundles["chameleon"], expected, tmp_path / "bundle"))
    random = np.random.default_rng(11)
    prose = [text for kind in KINDS for text in python_texts(kind)[:200]]
    texts = ["", *prose, " " * 5000, "a" * 5000, "'" * 999, *(random_text(random, prose) for _ in range(TEXTS // 2))]
    for text, encoding in zip(texts, expected.encode_batch(texts, add_special_tokens=False), strict=True):
        assert native.encode(text.encode()) == encoding.ids, text
    for _ in range(TEXTS // 10):  # any ids: bytes that are no text, special tokens, ids that do not exist
        ids = random.integers(0, 3100, random.integers(0, 12)).tolist()
        assert native.decode(ids) == expected.decode(ids, skip_special_tokens=True), ids
    native.close()


def splitting_tokenizer() -> Tokenizer:
    """Merges across every border at which GPT-2's pattern may split, so that the ids show where it did."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    after_a = [("a", byte) for byte in alphabet]
    after_space = [("\u0120", byte) for byte in alphabet]
    before_digit = [(byte, "1") for byte in alphabet if byte not in "a\u0120"]
    before_mark = [(byte, "!") for byte in alphabet if byte not in "a\u0120"]
    merges = [*after_a, *after_space, *before_digit, *before_mark]
    tokens = [*alphabet, *dict.fromkeys(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("digits", [False, True])
def test_every_code_point_is_split_alike(mini_bundles: dict[str, Path], tmp_path: Path, digits: bool) -> None:
    """Letters, numbers, spaces and others of every plane, between a letter, a digit, a space and a mark."""
    expected = splitting_tokenizer()
    if digits:
        expected.pre_tokenizer = digits_apart()
    native = NativeRuntime(with_tokenizer(mini_bundles["chameleon"], expected, tmp_path / "bundle"))
    points = [p for p in range(sys.maxunicode + 1) if not 0xD800 <= p < 0xE000]
    texts = ["".join(f"a{chr(p)}1a {chr(p)}!a" for p in points[i : i + 16]) for i in range(0, len(points), 16)]
    for text, encoding in zip(texts, expected.encode_batch(texts, add_special_tokens=False), strict=True):
        assert native.encode(text.encode()) == encoding.ids, text.encode("unicode_escape")
    native.close()


@pytest.mark.parametrize("raw", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"ok \x80"])
def test_invalid_utf8_is_refused(mini_bundles: dict[str, Path], raw: bytes) -> None:
    native = NativeRuntime(mini_bundles["chameleon"])
    with pytest.raises(NativeError) as error:
        native.encode(raw)
    assert error.value.code == "input_invalid"
    native.close()


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": False}, LEVEL],
            }
        },
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, LEVEL]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [LEVEL]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": "Digits"}},
        {"pre_tokenizer": LEVEL | {"use_regex": False}},
        {"decoder": None},
        {"model": {"type": "WordPiece"}},
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    mini_bundles: dict[str, Path], tmp_path: Path, change: dict[str, object]
) -> None:
    bundle = with_tokenizer(mini_bundles["chameleon"], make_tokenizer("plain"), tmp_path / "bundle")
    file, manifest_file = bundle / "tokenizer.json", bundle / "bundle.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    manifest = json.loads(manifest_file.read_text())
    manifest["files"]["tokenizer.json"] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(NativeError) as error:
        NativeRuntime(bundle)
    assert error.value.code == "manifest_invalid"
