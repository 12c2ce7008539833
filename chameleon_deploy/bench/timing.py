"""Interleaved timing: machines are noisy, so a figure is a median of ratios, each of two samples that were neighbours.

A virtual machine becomes a tenth faster or slower within seconds, by what its host does; two samples in a row mostly
see the same machine.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chameleon_deploy.bench.ceilings import Ceilings

NOISY = 0.10  # ratios whose relative interquartile range is beyond this are taken again
MAX_EXTRA_ROUNDS = 2  # so many times as many rounds at most
RETRIES = 2  # of a sample during which others used the processors
SETTLE_SECONDS = 0.5  # at most, between samples, until the last engine's worker threads stop spinning


@dataclass(frozen=True)
class Part:
    """A stretch of work that has a row of its own in the results.

    units  how often it does `unit`, for a figure per unit
    num_bytes, num_operations  what it has to read and to multiply and add at the least
    """

    name: str
    units: int
    unit: str
    num_bytes: float
    num_operations: float


@dataclass(frozen=True)
class Engine:
    """run does the whole work, calls its argument with a part's name whenever a stretch of that part ends, and
    returns a result, whose deviation from the reference may be `bound` at most."""

    run: Callable[[Callable[[str], None]], Any]
    deviation: Callable[[Any], float]
    bound: float


@dataclass(frozen=True)
class Case:
    """One thing done by several engines; the first is the bundle as users run it, which the others are compared with.

    parts  by the names that engines call them; `whole` is the time from beginning to end
    """

    whole: Part
    engines: Mapping[str, Engine]
    parts: Mapping[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds of every engine for one part: medians over the rounds.

    ratios      how many times faster the first engine is than each other: medians of the ratios of neighbours
    spread      relative interquartile range of those ratios; of the seconds for the first engine
    deviations  of every engine's result from the reference, and its bounds: a fast wrong answer is an error
    disturbed   how many of all samples were taken while others used the processors, in spite of retries
    failed      engines that could not run, and why
    floor       seconds that no engine can beat on this machine, by ceilings measured in every round: their median
    share       of the first engine's seconds that the floor is: the median of the shares within each round
    """

    part: Part
    seconds: dict[str, float]
    ratios: dict[str, float]
    spread: dict[str, float]
    rounds: int
    retries: int
    disturbed: int
    deviations: dict[str, float]
    bounds: dict[str, float]
    failed: dict[str, str]
    floor: float
    share: float

    @property
    def wrong(self) -> list[str]:
        return [name for name, deviation in self.deviations.items() if not deviation <= self.bounds[name]]


def measure(
    case: Case,
    ceilings: Callable[[], Ceilings],
    rounds: int,
    report: Callable[[str, int, int], None],
    max_extra_rounds: int = MAX_EXTRA_ROUNDS,
) -> list[Timing]:
    """Time all engines in turn, each beside the first, `rounds` times after two warm-ups, more often where the ratios
    scatter.

    With max_extra_rounds 0 nothing is taken again, disturbed samples neither: a quick look is to stay quick.

    -> the whole, then its parts. An engine that raises is reported as failed; the first one's error is raised.
    """
    first, *_ = case.engines
    deviations, failed = _warm_up(case, report)
    order, shuffle = [name for name in deviations if name != first], random.Random(0)
    own: list[_Sample] = []  # of the first engine beside the ceilings, of each round
    reached: list[Ceilings] = []
    pairs: dict[str, list[tuple[_Sample, _Sample]]] = {name: [] for name in order}  # of the first engine and another
    retries = 0

    def take(name: str) -> _Sample:
        nonlocal retries
        sample, thrown_away = _undisturbed_sample(case.engines[name], RETRIES if max_extra_rounds else 0)
        retries += thrown_away
        return sample

    for attempt in range(1 + max_extra_rounds):
        for _ in range(rounds):
            own.append(take(first))
            _settle()
            reached.append(ceilings())
            shuffle.shuffle(order)  # nobody always runs on the same neighbour's caches
            for name in order:
                pair = [first, name]
                shuffle.shuffle(pair)
                taken = {engine: take(engine) for engine in pair}
                pairs[name].append((taken[first], taken[name]))
            report(case.whole.name, len(own), (attempt + 1) * rounds)
        if all(_spread(_ratios(taken, part)) <= NOISY for taken in pairs.values() for part in [None, *case.parts]):
            break
    samples = {first: own + [sample for taken in pairs.values() for sample, _ in taken]}
    samples |= {name: [sample for _, sample in taken] for name, taken in pairs.items()}
    disturbed = sum(sample.disturbed for taken in samples.values() for sample in taken)
    bounds = {name: case.engines[name].bound for name in deviations}

    def timing(key: str | None, part: Part) -> Timing:
        seconds = {name: [sample.seconds[key] for sample in taken] for name, taken in samples.items()}
        ratios = {name: _ratios(taken, key) for name, taken in pairs.items()}
        floors = [found.floor(part.num_bytes, part.num_operations) for found in reached]
        return Timing(
            part,
            {name: statistics.median(values) for name, values in seconds.items()},
            {name: statistics.median(values) for name, values in ratios.items()},
            {first: _spread(seconds[first])} | {name: _spread(values) for name, values in ratios.items()},
            len(own),
            retries,
            disturbed,
            deviations,
            bounds,
            failed,
            statistics.median(floors),
            statistics.median(floor / sample.seconds[key] for floor, sample in zip(floors, own, strict=True)),
        )

    return [timing(None, case.whole), *(timing(name, part) for name, part in case.parts.items())]


def _warm_up(case: Case, report: Callable[[str, int, int], None]) -> tuple[dict[str, float], dict[str, str]]:
    """Run every engine twice.  -> deviations of those that could, reasons of those that could not"""
    first, *_ = case.engines
    deviations, failed = {}, {}
    for done, (name, engine) in enumerate(case.engines.items()):
        report(f"{case.whole.name}: warm-up", done, len(case.engines))
        try:
            deviations[name] = engine.deviation(engine.run(_no_lap))
            engine.run(_no_lap)
        except Exception as error:  # whatever a foreign engine raises
            if name == first:
                raise
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    report(f"{case.whole.name}: warm-up", len(case.engines), len(case.engines))
    return deviations, failed


def median_seconds(work: Callable[[], object], rounds: int = 7) -> float:
    """Of one thing alone, after a warm-up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


@dataclass(frozen=True)
class _Sample:
    """seconds of every part, and of the whole under None."""

    seconds: dict[str | None, float]
    disturbed: bool


def _sample(engine: Engine) -> _Sample:
    _settle()
    parts: dict[str | None, float] = {}
    before = _Processors.now()
    start = last = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[part] = parts.get(part, 0.0) + now - last
        last = now

    engine.run(lap)
    whole = time.perf_counter() - start
    # The kernel counts in hundredths of a second, so a short sample gets some leeway.
    return _Sample(parts | {None: whole}, _Processors.now().lost_since(before) > 0.03 + 0.05 * whole)


def _undisturbed_sample(engine: Engine, max_retries: int) -> tuple[_Sample, int]:
    """A sample, and how many had to be thrown away for it."""
    retries = 0
    while (sample := _sample(engine)).disturbed and retries < max_retries:
        retries += 1
    return sample, retries


@dataclass(frozen=True)
class _Processors:
    """Seconds of processor time so far: used by all, by this process, stolen from this machine by others on its host,
    and waited for by this process's threads while they were ready to run."""

    used: float
    own: float
    stolen: float
    waited: float

    @classmethod
    def now(cls) -> _Processors:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        tick, own, waited = os.sysconf("SC_CLK_TCK"), os.times(), 0
        for task in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                waited += int((task / "schedstat").read_text().split()[1])
        return cls((user + nice + system + irq + softirq) / tick, own.user + own.system, steal / tick, waited / 1e9)

    def lost_since(self, before: _Processors) -> float:
        """What others took from this process: a thread that waited for one of its own is no loss, nor is an idle
        processor that another one used."""
        by_others = (self.used - before.used) - (self.own - before.own)
        return self.stolen - before.stolen + min(by_others, self.waited - before.waited)


def _settle() -> None:
    """Wait until this process's threads are idle."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.002:
            return


def _ratios(pairs: Iterable[tuple[_Sample, _Sample]], part: str | None) -> list[float]:
    return [other.seconds[part] / first.seconds[part] for first, other in pairs]


def _spread(values: list[float]) -> float:
    """Relative interquartile range; of fewer than four values, from the least to the largest."""
    low, high = min(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def _no_lap(part: str) -> None:
    pass
