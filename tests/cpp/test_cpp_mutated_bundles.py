"""Damaged bundles with right digests: both languages give the same code, and neither crashes, hangs or takes memory.

CHAMELEON_EXAMPLES=10000 makes as many bundles; a run of the suite makes a few.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cpp.c_interface import BUILD
from tests.mutated_bundles import mutate
from tests.open_bundles import resident
from tests.shared_data import good_bundle

EXAMPLES = int(os.environ.get("CHAMELEON_EXAMPLES", "150"))
SECONDS = 5
MORE_BYTES = 64 * 2**20
BUNDLES = ("chameleon_masked", "chameleon_paper", "lora_masked", "chameleon_given")


class Worker:
    """A process that opens bundles, started again after it has ended or was ended."""

    def __init__(self, command: Sequence[Any]) -> None:
        self._command = list(map(str, command))
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def open(self, bundle: Path) -> tuple[str, int]:
        """Return the code of a bundle and the growth of memory in bytes."""
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.write(f"{bundle}\n")
        process.stdin.flush()
        # In slices, so that a machine that was suspended is not taken for a hang.
        ready = any(select.select([process.stdout], [], [], 0.1)[0] for _ in range(SECONDS * 10))
        line = process.stdout.readline() if ready else ""
        if line:
            code, growth = line.split()
            return code, int(growth)
        process.kill()
        self.close()
        self._process = self._start()
        return f"ended:{process.returncode}" if ready else "hang", 0

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Worker]]:
    workers = {
        "Python": Worker([sys.executable, "-m", "tests.open_bundles"]),
        "C++": Worker([BUILD / "tests" / "open_bundles"]),
    }
    for worker in workers.values():
        worker.open(good_bundle(BUNDLES[0]))  # what the libraries allocate once
    yield workers
    for worker in workers.values():
        worker.close()


def test_a_good_bundle_is_ok(workers: dict[str, Worker]) -> None:
    for name in BUNDLES:
        assert [worker.open(good_bundle(name))[0] for worker in workers.values()] == ["ok", "ok"]


def test_what_hangs_or_ends_is_noticed(tmp_path: Path) -> None:
    for script, code in (("import time; time.sleep(60)", "hang"), ("import os; os.abort()", "ended:-6")):
        worker = Worker([sys.executable, "-c", script])
        try:
            found, _ = worker.open(tmp_path)
            assert found == code
        finally:
            worker._process.kill()
            worker.close()


def test_memory_that_was_given_back_is_counted() -> None:
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    assert len(bytearray(MORE_BYTES) + b"x") > MORE_BYTES  # a copy, so that every page is written
    assert resident("VmHWM") - before > MORE_BYTES


@pytest.mark.timeout(max(600, EXAMPLES))
def test_mutated_bundles(workers: dict[str, Worker], tmp_path: Path) -> None:
    faults, codes = [], Counter[str]()
    for seed in range(EXAMPLES):
        good = good_bundle(BUNDLES[seed % len(BUNDLES)])
        what = mutate(good, tmp_path / "bundle", seed)
        limit = sum(file.stat().st_size for file in (tmp_path / "bundle").iterdir()) + MORE_BYTES
        found = {language: worker.open(tmp_path / "bundle") for language, worker in workers.items()}
        codes[found["Python"][0]] += 1
        is_foreign = any(":" in code or code == "hang" for code, _ in found.values())
        if (
            is_foreign
            or len({code for code, _ in found.values()}) > 1
            or max(found.values(), key=lambda f: f[1])[1] > limit
        ):
            faults.append(f"seed {seed}, {good.name}, {what}: {found}")
        shutil.rmtree(tmp_path / "bundle")
    print(codes.most_common())
    assert not faults, "\n".join([f"{len(faults)} of {EXAMPLES}", *faults])
