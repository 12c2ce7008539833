"""Read texts from files with one rule for training, scoring and prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import InputError


def read_texts(paths: Iterable[Path]) -> list[str]:
    """Return the texts of UTF-8 files, in order.

    A `.jsonl` file holds one JSON object with a string "text" per line. Any other file holds paragraphs, separated by
    blank lines.

    Raises InputError for a file that is missing, empty, not UTF-8, or not in that format.
    """
    texts: list[str] = []
    for path in paths:
        texts += _read_one(path)
    return texts


def read_conditioned(paths: Sequence[Path]) -> tuple[list[str], FloatArray]:
    """Return the texts of `.jsonl` files and the vector of each, float32 [texts, size].

    A line has one JSON object with a string "text" and a list of numbers "conditioning", all of one length.

    Raises InputError for another file, and what `read_texts` raises.
    """
    texts: list[str] = []
    vectors: list[Any] = []
    for path in paths:
        if path.suffix != ".jsonl":
            raise InputError(f"{path}: texts with vectors are .jsonl files with the fields text and conditioning")
        for entry in _read_entries(path):
            texts.append(entry["text"])
            vectors.append(entry.get("conditioning"))
    try:
        found = np.array(vectors, np.float32)
    except (TypeError, ValueError):
        found = np.empty(0, np.float32)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        names = ", ".join(map(str, paths))
        raise InputError(f'{names}: every line needs a "conditioning", a list of as many finite numbers as the others')
    return texts, found


def require_one_source(text: Sequence[Path] | None, dataset: str | None, only_with_text: Mapping[str, object]) -> None:
    """Check that a command's texts come from one source: --text or --dataset.

    only_with_text  values, by option name, of the options that a dataset excludes, since it has splits

    Raises InputError.
    """
    if bool(text) == bool(dataset):
        raise InputError("pass either --text FILE or --dataset NAME")
    for option, value in only_with_text.items():
        if dataset and value:
            raise InputError(f"{option} goes with --text: --dataset {dataset} has its own splits")


def _read_one(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [entry["text"] for entry in _read_entries(path)]
    texts = [block.strip("\r\n") for block in re.split(r"\n[ \t\r]*\n", read_file(path)) if block.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return texts


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a `.jsonl` file, each with a text."""
    lines = enumerate(read_file(path).split("\n"), 1)
    entries = [_parse_entry(path, number, line) for number, line in lines if line.strip()]
    if not entries:
        raise InputError(f"{path}: holds no text")
    return entries


def read_file(path: Path) -> str:
    """Return the text of a file. Raises InputError."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file first") from error


def _parse_entry(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(line)
        text = entry["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{path}, line {number}: expected a JSON object with a string "text"') from error
    if not isinstance(text, str) or not text:
        raise InputError(f'{path}, line {number}: "text" must be a string that is not empty')
    return entry
