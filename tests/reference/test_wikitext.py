"""WikiText files: lines of running text, and articles that stand on one side whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy.errors import InputError
from chameleon_deploy.reference.wikitext import main, read_articles, split_articles
from chameleon_deploy.terminal.texts import read_texts

TEXT = """ \n = First = \n \n It begins . \n \n = = Section = = \n \n It goes on .\n = = = Deeper = = = \n
 = Empty = \n \n = Second = \n \n x = y = z holds . \n
 = Third = \n
 Only this .
"""


def test_lines_of_articles(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text(TEXT)
    assert read_articles(file) == [[" It begins .", " It goes on ."], [" x = y = z holds ."], [" Only this ."]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=5, max_size=30), st.integers(0, 9))
def test_an_article_stands_on_one_side(sizes: list[int], seed: int) -> None:
    articles = [[f"{number}.{line}" for line in range(size)] for number, size in enumerate(sizes)]
    train, held_out = split_articles(articles, 0.2, seed)
    assert sorted(train + held_out) == sorted(line for article in articles for line in article)
    assert not {line.split(".")[0] for line in train} & {line.split(".")[0] for line in held_out}
    assert (train, held_out) == split_articles(articles, 0.2, seed)


def test_the_command_writes_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text("".join(f" = Article {i} = \n Text {i} .\n" for i in range(10)))
    main(file, tmp_path / "out", held_out=0.2)
    train, held_out = (read_texts([tmp_path / "out" / f"{side}.jsonl"]) for side in ("train", "validation"))
    assert (len(train), len(held_out)) == (8, 2)


def test_bad_input(tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("No article here.\n")
    with pytest.raises(InputError, match="no article"):
        read_articles(plain)
    with pytest.raises(InputError, match="cannot read"):
        read_articles(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="too few"):
        split_articles([["one"]], 0.2, 0)
