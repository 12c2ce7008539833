"""Interleaved timing: machines are noisy, so a figure is a ratio of medians taken in one run."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOISY = 0.10  # a relative interquartile range beyond this is measured again
MAX_EXTRA_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """One thing done by two engines. `difference` compares what they returned: a fast wrong answer is an error."""

    name: str
    ours: Callable[[], Any]
    reference: Callable[[], Any]
    difference: Callable[[Any, Any], float]
    units: int  # what one call does that many times, for a figure per unit
    unit: str


@dataclass(frozen=True)
class Timing:
    """Seconds per call: medians, with the relative interquartile range of each engine's samples."""

    name: str
    ours: float
    reference: float
    ours_spread: float
    reference_spread: float
    rounds: int
    difference: float
    units: int
    unit: str

    @property
    def ratio(self) -> float:
        """How many times faster than the reference."""
        return self.reference / self.ours


def measure(
    case: Case, rounds: int, report: Callable[[str, int, int], None], max_extra_rounds: int = MAX_EXTRA_ROUNDS
) -> Timing:
    """Time both engines in turn, `rounds` times each after one warm-up, more often where the samples scatter."""
    difference = case.difference(case.ours(), case.reference())
    samples: tuple[list[float], list[float]] = ([], [])
    for attempt in range(1 + max_extra_rounds):
        for done in range(rounds):
            # The order changes every time, so that neither engine always runs on the other's warm caches.
            for engine in ((0, 1), (1, 0))[done % 2]:
                start = time.perf_counter()
                (case.ours, case.reference)[engine]()
                samples[engine].append(time.perf_counter() - start)
            report(case.name, attempt * rounds + done + 1, (attempt + 1) * rounds)
        if max(map(_spread, samples)) <= NOISY:
            break
    ours, reference = map(statistics.median, samples)
    return Timing(case.name, ours, reference, _spread(samples[0]), _spread(samples[1]), len(samples[0]), difference,
                  case.units, case.unit)  # fmt: skip


def _spread(samples: list[float]) -> float:
    if len(samples) < 4:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / statistics.median(samples)


_LOAD = """
import sys, time
start = time.perf_counter()
import chameleon_deploy
runtime = chameleon_deploy.load(sys.argv[1], threads=int(sys.argv[2]))
seconds = time.perf_counter() - start
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
loaded = memory("VmRSS")
runtime.generate([[1] * 64], max_new_tokens=4)
print(seconds, loaded, memory("VmRSS"), memory("VmHWM"))
"""


@dataclass(frozen=True)
class LoadFigures:
    """seconds from importing to a loaded runtime in a fresh process; resident bytes after it, after a short
    generation, and at most."""

    seconds: float
    resident: int
    resident_after_generating: int
    peak: int


def measure_load(bundle: Path, threads: int, rounds: int) -> LoadFigures:
    """Load the bundle in `rounds` fresh processes and give the median of each figure."""
    runs = []
    for _ in range(rounds):
        output = subprocess.run(  # noqa: S603  (our own interpreter and code)
            [sys.executable, "-c", _LOAD, str(bundle), str(threads)], check=True, capture_output=True, text=True
        ).stdout
        runs.append([float(figure) for figure in output.split()])
    seconds, *sizes = (statistics.median(column) for column in zip(*runs, strict=True))
    return LoadFigures(seconds, *map(int, sizes))
