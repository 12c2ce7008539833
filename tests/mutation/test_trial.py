"""The runner of mutants tells those that a test kills from those that none can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation.__main__ import TESTS, source_of
from tests.mutation.operators import mutants

REPOSITORY = Path(__file__).parents[2]
FILES = {
    "planted.py": """
SIZE = 7
def make(added):
    return lambda value: value + added
increase = make(2)
class Box:
    @property
    def volume(self):
        return SIZE * 4
def larger(a, b):
    return a if a >= b else b
def wait(steps):
    while steps < 3:
        steps += 1
    return steps
def pause(steps, rest):
    while steps != 6:
        steps += rest()
    return steps
def unused(a):
    return not a
""",
    "conftest.py": """
import pytest
from planted import Box
@pytest.fixture(scope="session")
def volume():
    return Box().volume
""",
    "prepare.py": """
import pytest
@pytest.mark.parametrize("name", ["volume"])
def test_prepare(name, request):
    assert request.getfixturevalue(name)
""",
    "test_planted.py": """
from time import sleep
from planted import increase, larger, pause, wait
def test_increase():
    assert increase(1) == 3
def test_larger():
    assert (larger(1, 2), larger(2, 1), larger(1, 1)) == (2, 2, 1)
def test_volume(volume):
    assert volume == 28
def test_wait():
    assert wait(2) == 3
def test_pause():
    def rest():
        sleep(0.01)
        return 2
    assert pause(2, rest) == 6
""",
}
EQUAL, UNUSED = "a >= b -> a > b", "not a -> not not a"
COMPUTING, WAITING = "steps += 1 -> steps -= 1", {"steps += rest() -> steps -= rest()", "6 -> 7"}
RUN_BY_A_FIXTURE = {"SIZE * 4 -> SIZE / 4", "4 -> 5"}  # before the fork
RUN_BY_AN_IMPORT = {"7 -> 8", "2 -> 3"}  # not tried in a fork
RUN = """
import json, sys
from pathlib import Path

import pytest
from tests.mutation import trial
from tests.mutation.__main__ import TESTS, source_of
from tests.mutation.operators import mutants
trial.LEAST = trial.LEAST_ANEW = 1
trial.WAITING = 3
file = Path("planted.py").resolve()
everything = mutants(file.read_text())
serving = trial.serve(["prepare.py", "test_planted.py"], file, everything)
records = next(serving)
forked = dict(serving)
anew = {}
for mutant in everything:
    if tests := trial.tests_of(mutant, records):
        anew[mutant.number] = trial.try_anew(tests, "planted", file, mutant, records)
print(json.dumps([forked, anew]))
"""


def run(directory: Path) -> subprocess.CompletedProcess[str]:
    for name, text in FILES.items():
        (directory / name).write_text(text)
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, '.']\n{RUN}"],
        cwd=directory, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_killed_mutants_and_survivors(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    texts = {str(mutant.number): mutant.text for mutant in mutants(FILES["planted.py"])}
    forked, anew = ({texts[n]: outcome for n, outcome in found.items()} for found in json.loads(result.stdout))
    assert UNUSED not in forked | anew  # no test runs it
    assert {text for text, outcome in anew.items() if outcome == "survived"} == {EQUAL}
    assert {text for text, outcome in forked.items() if outcome == "survived"} == {EQUAL}
    assert {text for text, outcome in forked.items() if outcome == "undecided"} == RUN_BY_A_FIXTURE
    assert anew.keys() - forked.keys() == RUN_BY_AN_IMPORT
    for found in (forked, anew):
        assert {text for text, outcome in found.items() if outcome == "endless"} == {COMPUTING, *WAITING}


def test_tests_that_fail_without_a_mutant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "test_planted.py", "def test_planted():\n    assert 1 == 2\n")
    result = run(tmp_path)
    assert result.returncode == 1
    assert "test_planted.py::test_planted" in result.stderr


def test_tests_that_cannot_be_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "test_planted.py", "import planted, no_module\ndef test_planted():\n    pass\n")
    result = run(tmp_path)
    assert result.returncode == 1
    assert "No module named 'no_module'" in result.stderr


def test_every_module_and_its_tests_are_there() -> None:
    for name, parts in TESTS.items():
        assert source_of(name).is_file(), name
        for test in (*parts[0], *parts[1]):
            file, _, function = test.partition("::")
            assert f"def {function}" in (REPOSITORY / file).read_text(), test
