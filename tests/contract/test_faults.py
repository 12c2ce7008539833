"""A writer that is killed, or finds the disk full, broken or read-only, leaves a whole result or none.

CHAMELEON_EXAMPLES=200 tries as many points of each writer; a run of the suite tries a few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import find_program
from tests.conftest import REPOSITORY

POINTS = int(os.environ.get("CHAMELEON_EXAMPLES", "8"))


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "faults.so"
    source = REPOSITORY / "tests" / "faults.c"
    gcc = find_program("gcc", install="apt-get install gcc libc6-dev")
    subprocess.run([gcc, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def faults_of(target: str, shim: Path, directory: Path, points: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what was wrong at which point, and the numbers of points and operations."""
    command = [sys.executable, "-m", "tests.fault_points", target, str(directory / "work"), str(points)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY,
                            env={**os.environ, "LD_PRELOAD": str(shim)})  # fmt: skip
    assert result.returncode == 0, result.stderr
    *wrong, numbers = (json.loads(line) for line in result.stdout.splitlines())
    for fault in wrong:
        fault["stderr"] = result.stderr[-2000:]
    return wrong, numbers


@pytest.mark.timeout(max(600, 10 * POINTS))
@pytest.mark.parametrize("target", ["export", "adapter", "cache", "download"])
def test_a_fault_leaves_a_whole_result_or_none(target: str, shim: Path, tmp_path: Path) -> None:
    wrong, numbers = faults_of(target, shim, tmp_path, POINTS)
    assert wrong == []
    assert numbers["points"] == POINTS
    assert numbers["operations"] >= 12


def test_a_writer_that_leaves_half_a_result_is_noticed(shim: Path, tmp_path: Path) -> None:
    wrong, _ = faults_of("plain", shim, tmp_path, 16)
    assert {fault["action"] for fault in wrong} == {"kill", "EIO", "ENOSPC", "EROFS"}
