"""Text that every Python installation has, in four different kinds.

prose      the language reference, from pydoc_data
code       module source without comments and docstrings
docstring  docstrings of the standard library
changelog  IDLE's news files

The tiny model is trained on it, and `verify` uses it if no text is given. The content depends on the Python version; a
text's side of the split (`corpus.split_texts`) does not.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

KINDS = ("prose", "code", "docstring", "changelog")
MAX_CHARACTERS = 700


def python_texts(kind: str, most: int | None = None) -> list[str]:
    """Return the first texts of one kind, each of 80 to 700 characters, in a fixed order, without duplicates.

    most  how many; None returns all, for which the whole standard library is parsed

    Raises KeyError for an unknown kind.
    """
    return list(_texts(kind, most))


@functools.cache  # parsing takes seconds and its result is constant in a process
def _texts(kind: str, most: int | None) -> tuple[str, ...]:
    sources = {"prose": _prose, "code": _code, "docstring": _docstrings, "changelog": _changelogs}
    pieces = (piece for source in sources[kind]() for piece in _pieces(source))
    found: dict[str, None] = {}
    while len(found) != most and (piece := next(pieces, None)) is not None:
        found[piece] = None
    return tuple(found)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(_library().glob("*.py")):
        try:
            with tokenize.open(file) as opened:
                source = opened.read()
            yield source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue


def _code() -> Iterator[str]:
    for _, tree in _modules():
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_docstring(body[0]) and len(body) > 1:
                body.pop(0)
        yield ast.unparse(tree)


def _docstrings() -> Iterator[str]:
    for _, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def _changelogs() -> Iterator[str]:
    for name in ("NEWS.txt", "News3.txt", "NEWS2x.txt", "News2x.txt", "ChangeLog", "HISTORY.txt"):
        file = _library() / "idlelib" / name
        if file.is_file():
            yield file.read_text("utf-8", errors="replace")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _pieces(source: str) -> Iterator[str]:
    """Split at blank lines, then join paragraphs until a piece is long enough."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", source):
        joined = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(joined) > MAX_CHARACTERS and piece:
            yield from _sized(piece)
            joined = paragraph
        piece = joined
    yield from _sized(piece)


def _sized(piece: str) -> Iterator[str]:
    while len(piece) > MAX_CHARACTERS:
        cut = piece.rfind("\n", 80, MAX_CHARACTERS)
        cut = cut if cut > 0 else MAX_CHARACTERS
        yield piece[:cut]
        piece = piece[cut:].lstrip("\n")
    if len(piece.strip()) >= 80:
        yield piece
