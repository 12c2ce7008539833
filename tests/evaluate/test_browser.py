"""The HTML report in a real browser: headless Chromium shows its tables and plots, and fetches nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from chameleon_deploy import compare
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from tests.browser import launched, open_tab

BLUE = (9, 105, 218)  # the first colour of the plots


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(mini_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a very short experiment."""
    directory = tmp_path_factory.mktemp("report")
    corpus, page = directory / "texts.jsonl", directory / "report.html"
    texts = [text for kind in KINDS for text in python_texts(kind, 12)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    compare.main(
        text=[corpus], base=str(mini_path / "base"), work=directory / "work", seeds=2, epochs=1, clusters=3,
        max_length=32, html=page,
    )  # fmt: skip
    return page


def test_the_report_in_a_browser(browser: Browser, report: Path) -> None:
    with open_tab(browser, report.as_uri()) as tab:
        assert tab.complaints == []
        assert tab.requests == {report.as_uri()}
        assert tab.page.locator("h2").all_text_contents() == [
            "The three regimes", "Modes and controls", "Learning curves", "Perplexity by cluster",
            "Map of the text embeddings", "Gain against cohort size and mode",
        ]  # fmt: skip
        assert tab.page.locator("table").count() == tab.page.locator("svg").count() == 4
        for words in ("141,056", "82,272", "shuffled conditioning", "texts per cohort", "centroid"):
            assert words in tab.page.content(), words
        pixels = tab.pixels()
    ink = np.asarray((pixels < 128).all(2))
    assert 0.003 < ink.mean() < 0.3  # neither blank nor black
    assert all(part.any() for part in np.array_split(ink, 4))  # the whole page is filled, from top to bottom
    assert (pixels == BLUE).all(2).sum() > 500  # plots are drawn, not only described


def test_the_browser_would_have_seen_a_fault(browser: Browser, report: Path, tmp_path: Path) -> None:
    """A script and a picture from elsewhere: refused with a complaint by the report's policy, fetched without it."""
    html = report.read_text("utf-8")
    fault = '<script>document.title = 1</script><img src="http://127.0.0.1:9/picture.png">'
    broken, open_ = tmp_path / "broken.html", tmp_path / "open.html"
    broken.write_text(html.replace("</body>", fault + "</body>"), "utf-8")
    with open_tab(browser, broken.as_uri()) as tab:
        assert tab.complaints
    open_.write_text(f"<!DOCTYPE html><title>blank</title>{fault}", "utf-8")
    with open_tab(browser, open_.as_uri()) as tab:
        assert tab.requests == {open_.as_uri(), "http://127.0.0.1:9/picture.png"}
        assert not (tab.pixels() == BLUE).all(2).any()
