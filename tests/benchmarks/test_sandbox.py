"""`benchmarks.sandbox`: a program passes only if it reaches its end, and ends whatever it does."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

from benchmarks import sandbox

IMPORTS = (
    "import collections, copy, datetime, functools, hashlib, heapq, itertools, math, random, re, statistics, string"
)
FAILING = {
    "wrong": "assert 1 + 1 == 3",
    "no Python": "def",
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "swallowed": "import sys\ntry:\n    assert False\nfinally:\n    sys.exit(0)",
    "its own process": "import os, signal\nsignal.raise_signal(9)",
    "memory": "kept = []\nwhile True:\n    kept.append(bytearray(10**7))",
    "many processes": "import os\nwhile True:\n    os.fork()",
}
# Each with the error that says that it is forbidden: a program that fails for another reason shows nothing.
FORBIDDEN = {
    "fork": ("os.fork()", PermissionError),
    "another program": ("subprocess.run(['true'])", PermissionError),
    "thread": ("threading.Thread(target=print).start()", RuntimeError),
    "socket": ("socket.socket()", PermissionError),
    "signal": ("os.kill(os.getppid(), 0)", PermissionError),
    "new file": ("open('new', 'w')", PermissionError),
    "file elsewhere": ("open({path!r}, 'w')", PermissionError),
    "removal": ("os.remove({path!r})", PermissionError),
    "memory": ("bytearray(2**31)", MemoryError),
    "more memory": ("resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", ValueError),
}


def test_a_right_program_passes() -> None:
    assert sandbox.run(f"{IMPORTS}\nassert math.isqrt(10) == 3") == "passed"


@pytest.mark.parametrize("name", FAILING)
def test_a_program_that_does_not_reach_its_end_fails(name: str) -> None:
    assert sandbox.run(FAILING[name]) == "failed"


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time\ntime.sleep(600)", "while True: print('x' * 10**6)"]
)
def test_a_program_that_does_not_end_is_killed(program: str) -> None:
    assert sandbox.run(program, seconds=1) == "timeout"


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_a_program_may_not_do(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    code, error = FORBIDDEN[name]
    code = code.format(path=str(file))
    program = f"""\
        import os, resource, socket, subprocess, threading
        try:
            {code}
        except {error.__name__}:
            pass
        else:
            raise AssertionError
        """
    assert sandbox.run(textwrap.dedent(program)) == "passed"
    assert file.read_text() == "here"


def test_without_the_sandbox_they_may(tmp_path: Path) -> None:
    """Else a test of what is forbidden could not fail."""
    file = tmp_path / "file"
    file.write_text("here")
    os.kill(os.getppid(), 0)
    os.remove(file)  # noqa: PTH107  (the very call)
    assert not file.exists()


def test_a_system_that_cannot_confine_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = Path(sandbox.__file__).read_text()
    (tmp_path / "sandbox.py").write_text(child.replace("libc.prctl(22, 2", "libc.prctl(22, 9"))  # no such mode
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(sandbox.SandboxError, match="cannot confine"):
        sandbox.run("pass")
