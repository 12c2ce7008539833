"""A process that answers questions of its parent within bounds on processor time and memory.

Its program is a script, run with nothing imported but what it needs. Lines of JSON go both ways: first what all its
answers are about, then one question after the other; an answer has "text" or "error". At a bound of the operating
system the process ends.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any


class BoundedProcess:
    """A process that is started again after it ended at a bound. Safe to use from any thread.

    first_answer  to what its answers are about
    """

    def __init__(self, program: Path, seconds: float, memory: int, about: Any) -> None:
        """
        program  takes the two bounds as its arguments
        seconds  of processor time, of an answer
        memory   bytes of address space
        about    what its answers are about
        """
        self._command = [sys.executable, "-I", str(program), str(seconds), str(memory)]
        self._at_bound = {"error": f"it takes more than {seconds:g} seconds, {memory >> 20} MB, or the stack"}
        self._about, self._lock = json.dumps(about), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        with self._lock:
            _, self.first_answer = self._start()

    def ask(self, question: Any) -> dict[str, str]:
        """Return the answer. Raises TypeError, ValueError or RecursionError for what cannot be written as JSON."""
        line = json.dumps(question)
        with self._lock:
            process = self._process or self._start()[0]
            try:
                answer = self._ask(process, line)
            except BaseException:  # an interrupt: its answer would be taken for that to the next question
                self.stop()
                raise
            if "text" not in answer and process.poll() is not None:
                self.stop()
        return answer

    def stop(self) -> None:
        if self._process is not None:
            self._process = None
            self._end()

    def _start(self) -> tuple[subprocess.Popen[bytes], dict[str, str]]:
        process = subprocess.Popen(  # noqa: S603
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._process, self._end = process, weakref.finalize(self, _end, process)
        return process, self._ask(process, self._about)

    def _ask(self, process: subprocess.Popen[bytes], line: str) -> dict[str, str]:
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
        return self._at_bound


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # of what was not written
        process.communicate()
