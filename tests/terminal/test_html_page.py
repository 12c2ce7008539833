"""The HTML page that `bench` and `evaluate` write: whole, escaped, and in need of nothing from outside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chameleon_deploy.errors import DependencyError
from chameleon_deploy.terminal.html_page import Page
from chameleon_deploy.terminal.table import Sheet
from tests import page as reader

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' \N{SNOWMAN}"


def example(path: Path) -> str:
    page = Page(HOSTILE, "subtitle")
    page.section(HOSTILE)
    page.text(HOSTILE)
    page.table(Sheet(["engine", HOSTILE], [[HOSTILE, "1.5"], ["other", "-2.5"]], caption=HOSTILE))
    for _ in range(2):
        with page.plot(HOSTILE) as figure:
            axes = figure.subplots()
            axes.plot([1, 2, 3], [1, 4, 9], label="squares <b>")
            axes.legend()
    page.write(path)
    return path.read_text(encoding="utf-8")


def test_a_page_is_whole_escaped_and_self_contained(tmp_path: Path) -> None:
    html = example(tmp_path / "page.html")
    page = reader.Page(html)
    assert not page.open
    assert "script" not in page.tags
    assert page.fetched == []
    assert "url(http" not in html
    assert page.text.count(HOSTILE) == 9  # wherever it was put, and the title twice
    assert page.tags.count("svg") == 2
    assert page.tags.count("td") == 4
    assert html.count('<td class="number">') == 2
    assert "squares <b>" in page.text  # a plot's words are text, and no markup
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert example(tmp_path / "a.html") == example(tmp_path / "b.html")


def test_without_matplotlib_there_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"chameleon-deploy\[report\]"):
        Page("title")
