"""The HTML report in a real browser: headless Chromium shows its tables and plots, and fetches nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from chameleon_deploy import compare
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from tests.browser import Page, find_chromium

BLUE = (9, 105, 218)  # the first colour of the plots


@pytest.fixture(scope="session")
def browser() -> str:
    return find_chromium()


@pytest.fixture(scope="module")
def report(mini_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a very short experiment."""
    directory = tmp_path_factory.mktemp("report")
    corpus, page = directory / "texts.jsonl", directory / "report.html"
    texts = [text for kind in KINDS for text in python_texts(kind)[:12]]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    compare.main(
        text=[corpus], base=str(mini_path / "base"), work=directory / "work", seeds=2, epochs=1, clusters=3,
        max_length=32, html=page,
    )  # fmt: skip
    return page


def test_the_report_in_a_browser(browser: str, report: Path, tmp_path: Path) -> None:
    page = Page(browser, report, tmp_path)
    assert page.console == []
    assert page.requests == set()
    headings = re.findall(r"<h2>(.*?)</h2>", page.dom)
    assert headings == ["The three regimes", "Modes and controls", "Learning curves", "Perplexity by cluster",
                        "Map of the text embeddings", "Gain against cohort size and mode"]  # fmt: skip
    assert page.dom.count("<table") == 4
    assert page.dom.count("<svg") == 4
    for words in ("141,056", "82,272", "shuffled conditioning", "texts per cohort", "centroid"):
        assert words in page.dom, words
    ink = np.asarray((page.pixels < 128).all(2))
    assert 0.003 < ink.mean() < 0.3  # neither blank nor black
    height = len(page.pixels)
    for part in range(4):  # the whole page is filled, from top to bottom
        assert ink[part * height // 4 : (part + 1) * height // 4].any()
    assert (page.pixels == BLUE).all(2).sum() > 500  # plots are drawn, not only described


def test_the_browser_would_have_seen_a_fault(browser: str, report: Path, tmp_path: Path) -> None:
    """A script and a picture from elsewhere: refused with a complaint by the report's policy, fetched without it."""
    html = report.read_text("utf-8")
    fault = '<script>document.title = 1</script><img src="http://127.0.0.1:9/picture.png">'
    broken, open_ = tmp_path / "broken.html", tmp_path / "open.html"
    broken.write_text(html.replace("</body>", fault + "</body>"), "utf-8")
    assert Page(browser, broken, tmp_path).console
    blank = f"<!DOCTYPE html><title>blank</title>{fault}"
    open_.write_text(blank, "utf-8")
    page = Page(browser, open_, tmp_path)
    assert page.requests == {"http://127.0.0.1:9/picture.png"}
    assert not (page.pixels == BLUE).all(2).any()
