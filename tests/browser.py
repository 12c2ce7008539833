"""Headless Chromium: a page as it is at rest, and a tab that is driven through the DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

COMMON = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
          "--disable-background-networking"]  # fmt: skip
SECONDS = 30.0


def find_program(*names: str, install: str) -> str:
    """A program: where it is missing this is a failure in CI, and a skip with its reason elsewhere."""
    for name in names:
        if (program := shutil.which(name)) is not None:
            return program
    reason = f"no {names[0]}: {install}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def find_chromium() -> str:
    return find_program("chromium", "chromium-browser", "google-chrome", install="apt-get install chromium")


class Page:
    """One page as the browser sees it: dom, what its console said, what it asked the network for, its pixels."""

    def __init__(self, browser: str, file: Path, tmp_path: Path) -> None:
        profile, shot, log = (tmp_path / f"{file.stem}.{kind}" for kind in ("profile", "png", "netlog"))
        common = [browser, *COMMON, f"--user-data-dir={profile}", "--enable-logging=stderr",
                  "--window-size=1200,3600"]  # fmt: skip
        dumped = self._run([*common, "--dump-dom", f"--log-net-log={log}", file.as_uri()])
        self.dom = dumped.stdout
        self.console = re.findall(r"CONSOLE.*", dumped.stderr)
        self.requests = _requests(json.loads(log.read_text()))
        self._run([*common, f"--screenshot={shot}", file.as_uri()])
        self.pixels = read_pixels(shot)

    @staticmethod
    def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)


def _requests(log: dict[str, Any]) -> set[str]:
    """Addresses that the page asked for; the browser's own errands have no initiator."""
    asked = (event.get("params") or {} for event in log["events"])
    return {
        p["url"]
        for p in asked
        if "url" in p and not p["url"].startswith("file:") and p.get("initiator") not in (None, "not an origin")
    }


def read_pixels(file: Path) -> npt.NDArray[np.int64]:
    """A screenshot.  -> int64 [height, width, 3]"""
    from matplotlib.image import imread

    return np.asarray(np.rint(imread(file)[..., :3] * 255), np.int64)


class Tab:
    """One tab. What it does to the page it does as a user would: by keys and by the pointer.

    events  of the protocol so far: console messages, exceptions, requests
    """

    def __init__(self, to_browser: int, from_browser: int, url: str) -> None:
        self._to, self._from = to_browser, from_browser
        self._received = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        origin = "/".join(url.split("/")[:3])
        permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        self.send("Browser.grantPermissions", origin=origin, permissions=permissions)
        self.size(1280, 900)
        self.send("Page.navigate", url=url)
        self.wait(f"location.origin === {json.dumps(origin)} && document.readyState === 'complete'")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            readable, _, _ = select.select([self._from], [], [], SECONDS)
            part = os.read(self._from, 2**16) if readable else b""
            assert part, "the browser does not answer"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of its promise."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    def wait(self, expression: str, seconds: float = SECONDS) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def key(self, key: str, modifiers: int = 0) -> None:
        """modifiers: 2 is Ctrl, 8 is Shift."""
        code = _KEY_CODES.get(key, ord(key[0].upper()))
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.send("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def write(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text) if text else self.key("Delete")

    def point(self, selector: str) -> tuple[float, float]:
        """Move the pointer onto an element."""
        x, y = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0];"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str) -> None:
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def size(self, width: int, height: int, mobile: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, file: Path) -> None:
        """Of the whole page."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, among them what the page's policy refused, and exceptions."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(parameters["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
                found.append(str(parameters["args"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(str(parameters["entry"]["text"]))
        return found

    @property
    def requests(self) -> set[str]:
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return {event["params"]["request"]["url"] for event in sent}


_KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39,
              "Delete": 46}  # fmt: skip


@contextmanager
def open_tab(browser: str, url: str, tmp_path: Path) -> Iterator[Tab]:
    """A browser of its own with one tab, driven through a pair of pipes: file descriptors 3 and 4 of the browser."""
    commands, to_browser = map(_high, os.pipe())
    from_browser, answers = map(_high, os.pipe())

    def connect() -> None:
        os.dup2(commands, 3)
        os.dup2(answers, 4)

    arguments = [browser, *COMMON, f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-pipe"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False,
                               preexec_fn=connect)  # fmt: skip
    os.close(commands)
    os.close(answers)
    try:
        yield Tab(to_browser, from_browser, url)
    finally:
        os.close(to_browser)  # the browser ends with its pipe
        os.close(from_browser)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _high(descriptor: int) -> int:
    """The same file under a number that is neither 3 nor 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
