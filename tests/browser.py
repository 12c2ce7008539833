"""Headless Chromium, driven by Playwright: a page, what it complained of, and what it asked the network for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.commands import find_program

SECONDS = 30.0
expect.set_options(timeout=SECONDS * 1000)


@contextmanager
def launched() -> Iterator[Browser]:
    """The system's Chromium. Until it ends, no asyncio loop can run in this thread."""
    program = find_program("chromium", "chromium-browser", "google-chrome", install="apt-get install chromium")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
        yield browser


@dataclass(frozen=True)
class Tab:
    """A page that is open.

    complaints  errors and warnings of its console, among them what its policy refused, and exceptions
    requests    addresses that it asked for
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: set[str] = field(default_factory=set)

    def pixels(self) -> npt.NDArray[np.int64]:
        """The whole page.  -> int64 [height, width, 3]"""
        from matplotlib.image import imread

        return np.asarray(np.rint(imread(io.BytesIO(self.page.screenshot(full_page=True)))[..., :3] * 255), np.int64)


@contextmanager
def open_tab(browser: Browser, url: str, **options: Any) -> Iterator[Tab]:
    """A page in a context of its own: no cookie, cache or storage of another. `options` are those of the context."""
    with browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}) as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(SECONDS * 1000)
        tab = Tab(context.new_page())

        def said(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                tab.complaints.append(message.text)

        tab.page.on("console", said)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("request", lambda request: tab.requests.add(request.url))
        tab.page.goto(url)
        yield tab
