"""Run tests on one mutant, in a process that is forked from one which has imported the heavy libraries."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from tests.mutation.operators import mutate

# Imported once; modules of this package must not be, since each process imports them with its own mutant.
HEAVY = ("hypothesis", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors.torch", "scipy.stats",
         "sklearn.cluster", "tokenizers", "torch", "transformers", "transformers.models.gpt2.modeling_gpt2",
         "transformers.models.llama.modeling_llama", "typer")  # fmt: skip


class Loader(importlib.abc.Loader):
    """Loads one module with a mutant's tree in place of its source."""

    def __init__(self, file: Path, number: int) -> None:
        self._file, self._number = file, number

    def exec_module(self, module: ModuleType) -> None:
        tree = mutate(self._file.read_text(), self._number)
        exec(compile(tree, str(self._file), "exec", dont_inherit=True), module.__dict__)  # noqa: S102


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, file: Path, number: int) -> None:
        self._name, self._loader, self._file = name, Loader(file, number), file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._file, loader=self._loader)


class Recorder:
    """A pytest plugin: the lines of one file that each test runs, and how long it takes."""

    def __init__(self, file: Path) -> None:
        self._file, self._lines = str(file), set[int]()
        self.tests: dict[str, dict[str, Any]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._lines, start = set(), time.perf_counter()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        yield
        sys.settrace(None)
        threading.settrace(None)
        self.tests[item.nodeid] = {"seconds": time.perf_counter() - start, "lines": sorted(self._lines)}

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._local if frame.f_code.co_filename == self._file else None

    def _local(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._lines.add(frame.f_lineno)
        return self._local


def import_heavy() -> None:
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # each process would import them again
    for name in HEAVY:
        importlib.import_module(name)


def record(tests: Sequence[str], file: Path) -> dict[str, dict[str, Any]]:
    """Run tests without a mutant. Return the lines of `file` that each one runs, and its seconds."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "tests.json"

        def child() -> int:
            recorder = Recorder(file)
            code = int(pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[recorder]))
            out.write_text(json.dumps(recorder.tests))
            return code

        code = _in_child(child, None)
        if code != 0:
            raise RuntimeError(f"the tests fail without a mutant (exit code {code}): {' '.join(tests)}")
        recorded: dict[str, dict[str, Any]] = json.loads(out.read_text())
        return recorded


def is_killed(tests: Sequence[str], name: str, file: Path, number: int, seconds: float) -> bool:
    """Return whether a test fails on a mutant, or does not end in time."""

    def child() -> int:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        sys.meta_path.insert(0, Finder(name, file, number))
        return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", *tests]))

    return _in_child(child, seconds) != 0


def _in_child(work: Callable[[], int], seconds: float | None) -> int | None:
    """Return the exit code of `work` in a forked process, or None if it had to be ended."""
    process = os.fork()
    if process == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.02)
