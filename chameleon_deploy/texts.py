"""Texts from files, the same rule for training, scoring and prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from chameleon_deploy.errors import InputError


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Texts of UTF-8 files, in order.

    A `.jsonl` file holds one JSON object with a string "text" per line. Any other file holds
    paragraphs, separated by blank lines.

    Raises InputError for a file that is missing, empty, not UTF-8, or not of that form.
    """
    texts: list[str] = []
    for path in paths:
        texts += _read_one(path)
    return texts


def _read_one(path: Path) -> list[str]:
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file first") from error
    if path.suffix == ".jsonl":
        texts = [_text_of(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    else:
        texts = [block.strip("\r\n") for block in re.split(r"\n[ \t\r]*\n", content) if block.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return texts


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{path}, line {number}: expected a JSON object with a string "text"') from error
    if not isinstance(text, str) or not text:
        raise InputError(f'{path}, line {number}: "text" must be a string that is not empty')
    return text
