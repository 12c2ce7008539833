"""Split a file in WikiText's format into lines, by article.

python -m chameleon_deploy.reference.wikitext wiki.valid.tokens --out data/wikitext

Adjacent paragraphs of one article share names and subject, so held-out text must come from other articles.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.directory import new_directory
from chameleon_deploy.errors import InputError
from chameleon_deploy.terminal import console

_TITLE = re.compile(r"^ = [^=].*[^=] = $")


def read_articles(path: Path) -> list[list[str]]:
    """Return the text lines of each article, without headings, section markup and empty lines.

    Raises InputError if the file cannot be read or has no article title (` = Title = ` on a separate line).
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    articles: list[list[str]] = []
    for line in map(str.rstrip, lines):
        if _TITLE.match(line + " "):
            articles.append([])
        elif articles and line.strip() and not line.lstrip().startswith("= "):
            articles[-1].append(line)
    if not any(articles):
        raise InputError(f"{path}: no article in WikiText's format (a line ` = Title = `, then text)")
    return [article for article in articles if article]


def split_articles(articles: list[list[str]], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """Return training and held-out lines; each article is on one side.

    Raises InputError if either side would be empty.
    """
    order = list(range(len(articles)))
    random.Random(seed).shuffle(order)
    kept = set(order[: round(len(articles) * held_out)])
    train = [line for i, article in enumerate(articles) if i not in kept for line in article]
    validation = [line for i, article in enumerate(articles) if i in kept for line in article]
    if not train or not validation:
        raise InputError(f"{len(articles)} articles are too few to hold {held_out:.0%} out")
    return train, validation


def main(
    file: Annotated[Path, typer.Argument(help="A file in WikiText's format.")],
    out: Annotated[Path, typer.Option(help="Directory to write train.jsonl and validation.jsonl into.")],
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the articles that is held out.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Split a WikiText file by article into training and held-out texts, one line of text each."""
    articles = read_articles(file)
    sides = dict(zip(("train", "validation"), split_articles(articles, held_out, seed), strict=True))
    with new_directory(out) as directory:
        for name, texts in sides.items():
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            (directory / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    counts = ", ".join(f"{len(texts)} texts in {name}.jsonl" for name, texts in sides.items())
    console.stdout.print(f"{out}: {len(articles)} articles, {counts}")


if __name__ == "__main__":
    console.run(main)
