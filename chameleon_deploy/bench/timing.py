"""Interleaved timing: each sample is paired with an adjacent one of the baseline; a ratio is a median over pairs.

The speed of a virtual machine drifts by a tenth within seconds; two adjacent samples mostly see the same machine.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chameleon_deploy.bench.processors import Processors, settle
from chameleon_deploy.terminal.progress import Progress

NOISY = 0.10  # relative interquartile range of ratios above which more rounds are taken
SHORT = 0.01  # seconds: ratios of shorter parts vary with the scheduler and cause no more rounds
MAX_EXTRA_ROUNDS = 2  # at most this many additional batches of rounds
RETRIES = 2  # of a sample during which other processes used the processors

Lap = Callable[[str], None]  # called with a lap's name when that lap of the work ends


@dataclass(frozen=True)
class Part:
    """A timed part of the work.

    kind   the kind of work; with batch, width (tokens of every text) and new_tokens (per row) it identifies a part
    name   a readable name
    units  number of `unit`s that it does, for a figure per unit
    laps   the laps whose seconds are summed; empty for the whole work
    """

    kind: str
    name: str
    units: int
    unit: str
    batch: int = 1
    width: int = 0
    new_tokens: int = 0
    laps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contestant:
    """An engine that does the work of a case.

    run        does the whole work, reports its laps, and returns a result
    deviation  of a result from the reference, at most `bound`
    """

    run: Callable[[Lap], Any]
    deviation: Callable[[Any], float]
    bound: float


@dataclass(frozen=True)
class Case:
    """The same work done by several engines; all others are compared with the engine `baseline`."""

    whole: Part
    contestants: Mapping[str, Contestant]
    baseline: str
    parts: Sequence[Part] = ()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The figures of one part, by engine.

    seconds              medians over all samples
    ratios               seconds of an engine over those of the baseline: medians over pairs of adjacent samples
    interquartile_range  relative: of the baseline's seconds, and of the ratios
    rounds               pairs per engine
    retries, disturbed   samples taken again, and samples kept, during which other processes used the processors
    deviations, bounds   of the results from the reference, and the allowed limits
    failed               engines that raised, and why
    """

    part: Part
    baseline: str
    seconds: dict[str, float]
    ratios: dict[str, float]
    interquartile_range: dict[str, float]
    rounds: int
    retries: int
    disturbed: int
    deviations: dict[str, float]
    bounds: dict[str, float]
    failed: dict[str, str]

    @property
    def wrong(self) -> list[str]:
        return [name for name, deviation in self.deviations.items() if not deviation <= self.bounds[name]]

    @property
    def is_noisy(self) -> bool:
        ranges = [self.interquartile_range[name] for name in self.ratios]
        return self.seconds[self.baseline] >= SHORT and max(ranges, default=0.0) > NOISY


def measure(case: Case, rounds: int, report: Progress, max_extra_rounds: int = MAX_EXTRA_ROUNDS) -> list[Timing]:
    """Interleave all engines, after two warm-up runs each, and repeat while the ratios are noisy.

    max_extra_rounds  0 also disables retries of disturbed samples, for a quick look

    Returns the timing of the whole work, then of its parts. An engine that raises is reported as failed, without
    figures; an exception of the baseline is raised.
    """
    deviations, failed = _warm_up(case, report)
    others = [name for name in case.contestants if name != case.baseline and name not in failed]
    samples = _Samples(case, others, RETRIES if max_extra_rounds else 0, failed)
    timings: list[Timing] = []
    for attempt in range(1 + max_extra_rounds):
        for _ in range(rounds):
            samples.take_round()
            report(case.whole.name, samples.rounds, (attempt + 1) * rounds)
        timings = [samples.timing(part, deviations) for part in (case.whole, *case.parts)]
        if not any(timing.is_noisy for timing in timings):
            break
    return timings


def median_seconds(work: Callable[[], object], rounds: int = 7) -> float:
    """Return the median time of one function, after a warm-up call."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _warm_up(case: Case, report: Progress) -> tuple[dict[str, float], dict[str, str]]:
    """Run every engine twice. Returns the deviations of those that ran, and the errors of those that did not."""
    deviations, failed = {}, {}
    for done, (name, engine) in enumerate(case.contestants.items()):
        report(f"{case.whole.name}: warm-up", done, len(case.contestants))
        try:
            deviations[name] = engine.deviation(engine.run(_no_lap))
            engine.run(_no_lap)
        except Exception as error:  # a foreign engine may raise anything
            if name == case.baseline:
                raise
            failed[name] = _reason(error)
    report(f"{case.whole.name}: warm-up", len(case.contestants), len(case.contestants))
    return deviations, failed


@dataclass(frozen=True)
class _Sample:
    """One run of one engine: seconds of the whole and of its laps."""

    whole: float
    laps: dict[str, float]
    disturbed: bool

    def has(self, part: Part) -> bool:
        return not part.laps or any(lap in self.laps for lap in part.laps)

    def seconds(self, part: Part) -> float:
        return sum(self.laps.get(lap, 0.0) for lap in part.laps) if part.laps else self.whole


@dataclass
class _Samples:
    """The samples of a case: all of the baseline, and pairs of adjacent samples of the baseline and another engine.

    others  the engines that have not failed
    failed  the others, and why; they have no samples
    """

    case: Case
    others: list[str]
    max_retries: int
    failed: dict[str, str]
    rounds: int = 0
    retries: int = 0
    baseline: list[_Sample] = field(default_factory=list)
    pairs: dict[str, list[tuple[_Sample, _Sample]]] = field(default_factory=dict)
    shuffle: random.Random = field(default_factory=lambda: random.Random(0))

    def take_round(self) -> None:
        """Take a pair of every engine, in random order, so that none always follows the same engine's use of the
        caches.
        """
        self.shuffle.shuffle(self.others)
        for name in list(self.others):
            self._take_pair(name)
        if not self.others:
            self.baseline.append(self._take(self.case.baseline))
        self.rounds += 1

    def _take_pair(self, name: str) -> None:
        order, taken = [self.case.baseline, name], dict[str, _Sample]()
        self.shuffle.shuffle(order)
        for engine in order:
            try:
                taken[engine] = self._take(engine)
            except Exception as error:  # a foreign engine may raise anything, after its warm-up too
                if engine == self.case.baseline:
                    raise
                self.others.remove(name)
                self.pairs.pop(name, None)
                self.failed[name] = _reason(error)
                return
        self.baseline.append(taken[self.case.baseline])
        self.pairs.setdefault(name, []).append((taken[self.case.baseline], taken[name]))

    def _take(self, name: str) -> _Sample:
        sample = _sample(self.case.contestants[name])
        for _ in range(self.max_retries):
            if not sample.disturbed:
                break
            self.retries += 1
            sample = _sample(self.case.contestants[name])
        return sample

    def timing(self, part: Part, deviations: dict[str, float]) -> Timing:
        """Return the figures of a part so far, of the engines that report its laps."""
        deviations = {name: deviation for name, deviation in deviations.items() if name not in self.failed}
        own = [sample.seconds(part) for sample in self.baseline]
        pairs = {
            name: [(baseline.seconds(part), other.seconds(part)) for baseline, other in taken]
            for name, taken in self.pairs.items()
            if taken[0][1].has(part)
        }
        ratios = {name: [theirs / ours for ours, theirs in taken] for name, taken in pairs.items()}
        seconds = {self.case.baseline: own} | {name: [theirs for _, theirs in taken] for name, taken in pairs.items()}
        kept = [*self.baseline, *(other for taken in self.pairs.values() for _, other in taken)]
        return Timing(
            part=part,
            baseline=self.case.baseline,
            seconds={name: statistics.median(values) for name, values in seconds.items()},
            ratios={name: statistics.median(values) for name, values in ratios.items()},
            interquartile_range={
                name: _interquartile_range(values) for name, values in {self.case.baseline: own, **ratios}.items()
            },
            rounds=self.rounds,
            retries=self.retries,
            disturbed=sum(sample.disturbed for sample in kept),
            deviations=deviations,
            bounds={name: self.case.contestants[name].bound for name in deviations},
            failed=dict(self.failed),
        )


def _sample(engine: Contestant) -> _Sample:
    settle()
    laps: dict[str, float] = {}
    before = Processors.now()
    start = last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        laps[name] = laps.get(name, 0.0) + now - last
        last = now

    engine.run(lap)
    whole = time.perf_counter() - start
    # The kernel counts in hundredths of a second, so a short sample gets some tolerance.
    return _Sample(whole, laps, Processors.now().lost_since(before) > 0.03 + 0.05 * whole)


def _interquartile_range(values: list[float]) -> float:
    """Return the interquartile range relative to the median; the whole range for fewer than four values."""
    low, high = min(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _no_lap(name: str) -> None:
    pass
