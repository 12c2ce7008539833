"""Interleaved timing: machines are noisy, so a figure is a ratio of medians taken in one run."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from chameleon_deploy.ceilings import Ceilings

NOISY = 0.10  # a relative interquartile range beyond this is measured again
MAX_EXTRA_ROUNDS = 2
SETTLE_SECONDS = 0.02  # between samples: the last engine's worker threads stop spinning


@dataclass(frozen=True)
class Case:
    """One thing done by several engines; the first is the bundle as users run it, which the others are compared with.

    different  engines that do less by design, so that their results are not compared
    num_bytes, num_flops  what one call has to read and to compute at the least
    """

    name: str
    engines: Mapping[str, Callable[[], Any]]
    units: int  # what one call does that many times, for a figure per unit
    unit: str
    num_bytes: float
    num_flops: float
    different: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds per call of every engine: medians, with the relative interquartile range of the samples.

    difference  largest absolute difference from the first engine's result: a fast wrong answer is an error
    floor       seconds that no engine can beat on this machine
    """

    name: str
    seconds: dict[str, float]
    spread: dict[str, float]
    rounds: int
    difference: float
    floor: float
    units: int
    unit: str

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each of the others the first engine is."""
        first, *others = self.seconds
        return {name: self.seconds[name] / self.seconds[first] for name in others}


def measure(
    case: Case,
    ceilings: Ceilings,
    rounds: int,
    report: Callable[[str, int, int], None],
    max_extra_rounds: int = MAX_EXTRA_ROUNDS,
) -> Timing:
    """Time all engines in turn, `rounds` times each after one warm-up, more often where the samples scatter."""
    first, *others = case.engines
    results = {name: engine() for name, engine in case.engines.items() if name not in case.different}
    difference = max((_difference(results[first], results[name]) for name in others if name in results), default=0.0)
    for name in case.different:
        case.engines[name]()
    samples: dict[str, list[float]] = {name: [] for name in case.engines}
    order, shuffle = list(case.engines), random.Random(0)
    for attempt in range(1 + max_extra_rounds):
        for done in range(rounds):
            shuffle.shuffle(order)  # nobody always runs on the same neighbour's caches
            for name in order:
                time.sleep(SETTLE_SECONDS)
                start = time.perf_counter()
                case.engines[name]()
                samples[name].append(time.perf_counter() - start)
            report(case.name, attempt * rounds + done + 1, (attempt + 1) * rounds)
        if max(map(_spread, samples.values())) <= NOISY:
            break
    return Timing(
        case.name,
        {name: statistics.median(values) for name, values in samples.items()},
        {name: _spread(values) for name, values in samples.items()},
        len(samples[first]),
        difference,
        ceilings.floor(case.num_bytes, case.num_flops),
        case.units,
        case.unit,
    )


def median_seconds(work: Callable[[], object], rounds: int = 7) -> float:
    """Of one thing alone, after a warm-up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _difference(ours: Any, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())


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
