"""The light runtime imports and runs without what only POSIX or Linux has."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

BUNDLE = REPOSITORY / "tests" / "data" / "bundles" / "chameleon_masked"
# None in sys.modules makes an import fail, as on a system that does not have the module.
OTHER_SYSTEM = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "O_DIRECTORY", "O_NOFOLLOW", "geteuid"):
    delattr(os, name)
import chameleon_deploy
"""


def _run(code: str) -> str:
    command = [sys.executable, "-c", OTHER_SYSTEM + code, str(BUNDLE)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_bundle_generates_and_scores() -> None:
    code = """
runtime = chameleon_deploy.load(sys.argv[1])
print(runtime.generate([[1, 2, 3]], max_new_tokens=3)[0].token_ids, runtime.score([[1, 2, 3]])[0].logprob)
"""
    here = [sys.executable, "-c", "import sys, chameleon_deploy" + code, str(BUNDLE)]
    assert _run(code) == subprocess.run(here, check=True, capture_output=True, text=True).stdout


def test_the_portable_graph_counts_the_processors_without_affinity() -> None:
    code = """
from chameleon_deploy.runtime.machine import describe_processor, usable_cores
print(usable_cores() == os.cpu_count(), bool(describe_processor()))
"""
    assert _run(code).split() == ["True", "True"]


@pytest.mark.parametrize("work", ["load(sys.argv[1], share_weights=True)", "directory.new_directory(out).__enter__()"])
def test_what_needs_file_locks_says_so(work: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("out")
    code = f"""
import pathlib
from chameleon_deploy import directory, load, ChameleonError
os.environ["CHAMELEON_DEPLOY_CACHE"] = {str(out)!r}
out = pathlib.Path({str(out)!r}) / "x"
try:
    {work}
except ChameleonError as error:
    print(error.code, error)
"""
    assert "output_failed this system has no POSIX file locks" in _run(code)


def test_a_file_is_written_whole(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("out") / "file"
    code = f"""
import pathlib
from chameleon_deploy.directory import write_whole
write_whole(pathlib.Path({str(out)!r}), lambda path: path.write_text("whole"))
"""
    _run(code)
    assert out.read_text() == "whole"
