"""Run tests on mutants, each in a process that is forked from one which has done everything before them.

Most mutants are tried in a fork of a *server*: a process that has imported the package, collected the tests and made
their bundles. The fork gives the mutant's code to the functions that exist and runs the tests. What an import or a
fixture of the server did before the fork has not seen the mutant, so one that survives there and whose line they ran is
tried again in a process that imports the package, and makes everything, with the mutant in place of the module.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Literal, TextIO

import hypothesis
import pytest
from hypothesis import Phase

from tests.mutation.operators import Mutant, mutate

# Imported once; modules of this package must not be, since processes import them with their own mutant.
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors.torch", "scipy.stats",
         "sklearn.cluster", "tokenizers", "torch", "transformers", "transformers.models.gpt2.modeling_gpt2",
         "transformers.models.llama.modeling_llama", "typer")  # fmt: skip
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # a fork has none but its own thread
PREPARE = "tests/mutation/prepare.py"  # a server runs it first
# No other plugin is loaded. That of timeouts defines a marker, and the runner has limits of its own.
OPTIONS = ("-p", "no:cacheprovider", "-p", "pytest_timeout", "-o", "timeout=0", "-o", "tmp_path_retention_policy=none")
POLL = 0.01  # seconds
LEAST, LEAST_ANEW = 20, 120  # seconds that a mutant may take, beside 10 times those that its tests take without it
WAITING = 5  # times its processor time that a process may take, since a machine can be busy
MEMORY = 16 << 30  # bytes that a mutant may map: an engine maps a tenth of the free memory for its prefix cache
ENDED = (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL)  # exit codes of a process whose limit has ended it
NOT_EXCHANGED = os.EX_UNAVAILABLE  # exit code of a fork whose functions cannot take a mutant's code

Outcome = Literal["survived", "killed", "endless", "undecided"]  # of a mutant; a fork may leave it undecided
Records = dict[str, dict[str, Any]]  # of each test its "lines", those of its fixtures too, and its "seconds"


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


def functions_of(file: Path) -> list[FunctionType]:
    """Return the functions of a module that exist, wherever they are kept."""
    return [f for f in gc.get_objects() if isinstance(f, FunctionType) and f.__code__.co_filename == str(file)]


def exchange(functions: Sequence[FunctionType], file: Path, number: int) -> bool:
    """Give the code of a mutant to the functions of a module. Return whether that was possible."""
    source = file.read_text()
    before = compile(source, str(file), "exec", dont_inherit=True)
    after = compile(mutate(source, number), str(file), "exec", dont_inherit=True)
    codes = {old: new for old, new in _pairs(before, after) if old != new}
    changed = [function for function in functions if function.__code__ in codes]
    if any(len(f.__code__.co_freevars) != len(codes[f.__code__].co_freevars) for f in changed):
        return False  # a function that exists keeps the number of its variables
    for function in changed:
        function.__code__ = codes[function.__code__]
    return bool(changed)


def _pairs(before: CodeType, after: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """The code objects inside two others, in order; fewer if the mutant has removed one."""
    inner = [[const for const in code.co_consts if isinstance(const, CodeType)] for code in (before, after)]
    if len(inner[0]) == len(inner[1]):
        for pair in zip(*inner, strict=True):
            yield pair
            yield from _pairs(*pair)


class Recorder:
    """A pytest plugin: the lines of one file that each test and its fixtures run, and how long it takes.

    fixtures  the lines that each has run
    """

    def __init__(self, file: Path) -> None:
        self._file = str(file)
        self._lines: list[set[int]] = [set()]  # of the test, then of each fixture that is being made
        self.fixtures: dict[str, set[int]] = defaultdict(set)
        self.tests: Records = {}
        self.failures: list[str] = []

    def start(self) -> None:
        self._lines = [set()]
        threading.settrace(self._trace)
        sys.settrace(self._trace)

    def stop(self) -> set[int]:
        """Return the lines that were run since the start."""
        sys.settrace(None)
        threading.settrace(None)
        return self._lines[0]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Any:
        start = _processor_seconds()
        self.start()
        yield
        lines = self.stop().union(*(self.fixtures[name] for name in item.fixturenames))
        self.tests[item.nodeid] = {"seconds": _processor_seconds() - start, "lines": sorted(lines)}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        self._lines.append(set())
        yield
        self.fixtures[fixturedef.argname] |= self._lines.pop()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._local if frame.f_code.co_filename == self._file else None

    def _local(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._lines[-1].add(frame.f_lineno)
        return self._local


def _processor_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    return sum(os.times()[:4])


class Limits:
    """A pytest plugin that ends the process in a test that takes much longer than without a mutant."""

    def __init__(self, records: Records, least: float) -> None:
        self._records, self._least = records, least

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        end_after(self._least + 10 * float(self._records[item.nodeid]["seconds"]))


class Server:
    """A pytest plugin that tries mutants instead of running tests. What it finds goes to `out`, a line of JSON each.

    First the records of the tests without a mutant, or their failures; then [number of a mutant, its outcome],
    and null at the end.

    recorder  started before anything is imported
    """

    def __init__(self, file: Path, mutants: Sequence[Mutant], recorder: Recorder, out: TextIO) -> None:
        self._file, self._mutants, self._recorder, self._out = file, mutants, recorder, out
        self._not_collected: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._not_collected.append(f"{report.nodeid}\n{report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        recorder, done = self._recorder, self._recorder.stop()  # by imports
        if self._not_collected:
            self._report({"failures": self._not_collected})
            return True
        preparing, tests = list[pytest.Function](), dict[str, pytest.Function]()
        for item in session.items:
            assert isinstance(item, pytest.Function)
            if item.path.name == Path(PREPARE).name:
                preparing.append(item)
            else:
                tests[item.nodeid] = item
        used = {name for item in tests.values() for name in item.fixturenames}
        session.config.pluginmanager.register(recorder)
        _run(session, [item for item in preparing if item.callspec.params["name"] in used], session.items[-1])
        done.update(*recorder.fixtures.values())
        recorded = _recorded(recorder, session, list(tests.values()))
        session.config.pluginmanager.unregister(recorder)
        self._report(recorded)
        functions = functions_of(self._file)
        gc.freeze()  # so that forks share its pages
        for mutant in () if recorded["failures"] else self._mutants:
            chosen = [tests[name] for name in tests_of(mutant, recorded["tests"])]
            if mutant.is_function and chosen:
                limits = Limits(recorded["tests"], LEAST)
                work = partial(self._try, session, functions, mutant, chosen, limits)
                code = in_child(work, limit(mutant, recorded["tests"]))
                is_undecided = code == NOT_EXCHANGED or (code == 0 and mutant.line in done)
                self._report([mutant.number, "undecided" if is_undecided else _outcome(code)])
        self._report(None)
        return True

    def _try(
        self,
        session: pytest.Session,
        functions: Sequence[FunctionType],
        mutant: Mutant,
        tests: Sequence[pytest.Item],
        limits: Limits,
    ) -> int:
        if not exchange(functions, self._file, mutant.number):
            return NOT_EXCHANGED
        session.config.pluginmanager.register(limits)
        _run(session, tests, session.items[0])
        return session.testsfailed  # 0 or 1

    def pytest_internalerror(self, excrepr: Any) -> None:
        self._report({"failures": [str(excrepr)]})

    def _report(self, message: Any) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def _recorded(recorder: Recorder, session: pytest.Session, items: Sequence[pytest.Function]) -> dict[str, Any]:
    """Run the tests without a mutant, in a fork too: one that cannot run there would kill every mutant."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "recorded.json"

        def child() -> int:
            _run(session, items, None)
            tests = {item.nodeid: recorder.tests.get(item.nodeid) for item in items}
            out.write_text(json.dumps({"tests": tests, "failures": recorder.failures}))
            return session.testsfailed

        code = in_child(child, 3600)
        recorded: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"failures": []}
    if code != 0 and not recorded["failures"]:
        recorded["failures"] = [f"exit code {code}"]
    return recorded


def _run(session: pytest.Session, items: Sequence[pytest.Item], last: pytest.Item | None) -> None:
    """Run tests until one fails. `last` keeps the fixtures that it shares with the last one."""
    for item, following in itertools.pairwise([*items, last]):
        assert item is not None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return


def set_environment() -> None:
    """Set, before anything is imported, what makes forks cheap and safe."""
    os.environ |= dict.fromkeys(ONE_THREAD, "1") | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def import_heavy() -> None:
    for name in HEAVY:
        importlib.import_module(name)


def tests_of(mutant: Mutant, records: Records) -> list[str]:
    """The tests that run a mutant's line, or all if an import runs it: file by file, the fast ones first."""
    fitting = [name for name, record in records.items() if mutant.line in record["lines"] or not mutant.is_function]
    fitting.sort(key=lambda name: float(records[name]["seconds"]))
    files = list(dict.fromkeys(name.split("::")[0] for name in fitting))
    return sorted(fitting, key=lambda name: files.index(name.split("::")[0]))


def limit(mutant: Mutant, records: Records, least: float = LEAST) -> float:
    """Seconds after which a mutant counts as one that never ends."""
    return least + 10 * float(sum(records[name]["seconds"] for name in tests_of(mutant, records)))


def serve(tests: Sequence[str], file: Path, mutants: Sequence[Mutant], options: Sequence[str] = ()) -> Iterator[Any]:
    """Try mutants in forks of a server. Yield the records of the tests, then (number, outcome) of mutants.

    Mutants that no test runs, or an import, are left out.
    """
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        server = Server(file, mutants, recorder := Recorder(file), os.fdopen(write, "w"))
        recorder.start()
        _leave(lambda: _pytest([*options, *tests], [server]))
    os.close(write)
    try:
        with os.fdopen(read) as lines:
            recorded = json.loads(next(lines, '{"failures": ["the server ended"]}'))
            if recorded["failures"]:
                raise RuntimeError("tests fail without a mutant:\n" + "\n".join(recorded["failures"]))
            yield recorded["tests"]
            for found in map(json.loads, lines):
                if found is None:
                    return
                yield tuple(found)
        raise RuntimeError("the server ended before it had tried every mutant")
    finally:
        _end(process)


def try_anew(tests: Sequence[str], name: str, file: Path, mutant: Mutant, records: Records) -> Outcome:
    """Return the outcome of tests where the package is imported with a mutant, and makes the bundles."""

    def child() -> int:
        sys.meta_path.insert(0, Finder(name, file, mutant.number))
        return _pytest(["-x", *tests], [Limits(records, LEAST_ANEW)])

    return _outcome(in_child(child, limit(mutant, records, LEAST_ANEW)))


def _outcome(code: int | None) -> Outcome:
    """Return what the exit code of tests says; None is that of tests that had to be ended."""
    if code == os.EX_SOFTWARE:
        raise RuntimeError("the runner of mutants fails")
    return "endless" if code is None else "killed" if code else "survived"


def _pytest(arguments: Sequence[str], plugins: Sequence[Any]) -> int:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # The first failure will do, and is no example for the next run.
    hypothesis.settings.register_profile("mutants", database=None, phases=(Phase.explicit, Phase.generate))
    hypothesis.settings.load_profile("mutants")
    return int(pytest.main(["-q", "--tb=short", *OPTIONS, *arguments], plugins=plugins))


def in_child(work: Callable[[], int], seconds: float) -> int | None:
    """Return the exit code of `work` in a forked process, or None if it had to be ended.

    seconds  of processor time; a process that only waits is ended after WAITING times as many
    """
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds),) * 2)
        _leave(work)
    for _ in range(int(WAITING * seconds / POLL)):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code not in ENDED:
                return code
            break
        time.sleep(POLL)
    _end(process)
    return None


def end_after(seconds: float) -> None:
    """End this process when it has taken so much processor time from now on, or has waited WAITING times as long."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if most == resource.RLIM_INFINITY else min(soft, most), most))
    signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)


def _leave(work: Callable[[], int]) -> None:
    """End a forked process with the exit code of `work`; it never returns to what its parent was doing."""
    code = os.EX_SOFTWARE
    try:
        os.setpgid(0, 0)
        code = work()
    finally:
        os._exit(code)


def _end(process: int) -> None:
    """End a process and those that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # it has been waited for
        os.waitpid(process, 0)
