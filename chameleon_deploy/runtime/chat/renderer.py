"""The process that renders a chat template, as its parent sees it (render_process.py)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chameleon_deploy.errors import DependencyError, InputError, ManifestError

CPU_SECONDS = 2.0  # of one rendering, or of reading the template
MEMORY = 512 * 2**20  # bytes of address space
_PROGRAM = Path(__file__).with_name("render_process.py")


class Renderer:
    """A process that renders one template. It is started again after one that ended at a bound."""

    def __init__(self, source: str) -> None:
        self._source, self._lock = source, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        with self._lock:
            self._start()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises InputError where the template does, or goes beyond a bound."""
        try:
            line = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the conversation cannot be written as JSON: {error}", "messages") from error
        with self._lock:
            process = self._process or self._start()
            try:
                answer = _ask(process, line)
            except BaseException:  # an interrupt: its answer would be taken for that of the next conversation
                self._stop()
                raise
            if "text" not in answer and process.poll() is not None:
                self._stop()
        if "text" not in answer:
            raise InputError(f"the chat template fails: {answer['error']}", "messages")
        return str(answer["text"])

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("jinja2") is None:
            raise DependencyError("a chat template needs jinja2: pip install 'chameleon-deploy[serve]'")
        command = [sys.executable, "-I", str(_PROGRAM), str(CPU_SECONDS), str(MEMORY)]
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        answer = _ask(process, json.dumps(self._source))
        if "error" in answer:
            self._stop()
            raise ManifestError(f"the chat template is not valid: {answer['error']}")
        return process

    def _stop(self) -> None:
        self._process = None
        self._end()


def _ask(process: subprocess.Popen[bytes], line: str) -> dict[str, str]:
    """Send a line and return the answer to it, or the error that the process ended at a bound."""
    assert process.stdin is not None and process.stdout is not None  # noqa: S101  (for mypy: both are pipes)
    answer = b""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    if answer:
        return dict(json.loads(answer))
    process.wait()
    return {"error": f"it takes more than {CPU_SECONDS:g} seconds or {MEMORY >> 20} MB"}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # of what was not written
        process.communicate()
