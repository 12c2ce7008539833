"""Timing: ratios of adjacent samples, parts, failures, noise and samples disturbed by other processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from chameleon_deploy.bench import timing as measurement
from chameleon_deploy.bench.timing import Case, Contestant, Part, Timing, measure

PART = Part("kind", "work", 10, "unit")


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def process_time(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measurement, "time", clock)
    return clock


def silent(what: str, done: int, total: int) -> None:
    pass


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def engine(clock: Clock, first: float, second: float, deviation: float = 0.0) -> Contestant:
    def work(lap: Callable[[str], None]) -> None:
        for part, seconds in (("a", first), ("b", second), ("a", first)):
            clock.sleep(seconds)
            lap(part)

    return Contestant(work, lambda _: deviation, 0.5)


def measured(engines: dict[str, Contestant]) -> list[Timing]:
    parts = [replace(PART, name=name, laps=laps) for name, laps in (("a", ("a",)), ("b", ("b",)), ("both", ("a", "b")))]
    return measure(Case(PART, engines, "bundle", parts), 3, silent, 0)


def test_the_whole_and_its_parts_are_timed(clock: Clock) -> None:
    whole, a, b, both = measured({"bundle": engine(clock, 1, 4), "slow": engine(clock, 2, 4)})
    assert [timing.part.name for timing in (whole, a, b, both)] == ["work", "a", "b", "both"]
    assert a.seconds == pytest.approx({"bundle": 2, "slow": 4})  # two stretches together
    assert whole.seconds == both.seconds == pytest.approx({"bundle": 6, "slow": 8})
    assert [t.ratios["slow"] for t in (whole, a, b)] == pytest.approx([4 / 3, 2, 1])
    assert whole.interquartile_range == pytest.approx({"bundle": 0, "slow": 0}, abs=1e-9)
    assert whole.baseline == "bundle"
    assert whole.rounds == 3


def test_ratios_are_of_adjacent_samples(clock: Clock) -> None:
    """A machine that becomes slower and slower changes the seconds, and hardly the ratios: ten engines run between the
    first sample of a round and the last."""

    def work(seconds: float) -> Contestant:
        return Contestant(lambda lap: clock.sleep(seconds * (1 + clock.seconds / 200)), lambda _: 0.0, 0.5)

    engines = {"bundle": work(1), "other": work(1)} | {f"slow {i}": work(3) for i in range(8)}
    (timing,) = measure(Case(PART, engines, "bundle"), 5, silent, 0)
    assert timing.ratios["other"] == pytest.approx(1, abs=0.01)
    assert timing.interquartile_range["other"] < 0.02
    assert timing.interquartile_range["bundle"] > 0.3


def test_an_engine_without_a_lap_is_left_out_of_its_part(clock: Clock) -> None:
    def work(lap: Callable[[str], None]) -> None:
        clock.sleep(1)
        lap("b")

    whole, a, b, both = measured({"bundle": engine(clock, 1, 4), "plain": Contestant(work, lambda _: 0.0, 0.5)})
    assert set(a.seconds) == {"bundle"}
    assert a.ratios == {}
    assert (b.ratios["plain"], both.ratios["plain"]) == pytest.approx((1 / 4, 1 / 6))
    assert whole.seconds["plain"] == pytest.approx(1)


def test_noise_of_a_short_part_asks_for_no_more_rounds(clock: Clock) -> None:
    seconds = itertools.cycle([1e-3, 4e-3])
    noisy = Contestant(lambda lap: clock.sleep(next(seconds)), lambda _: 0.0, 0.5)
    (timing,) = measure(Case(PART, {"bundle": engine(clock, 1e-3, 1e-3), "noisy": noisy}, "bundle"), 4, silent, 2)
    assert timing.rounds == 4


def test_a_wrong_answer_and_a_failure_are_told_apart(clock: Clock) -> None:
    def fails(lap: Callable[[str], None]) -> None:
        raise RuntimeError("no such\nkernel")

    timings = measured(
        {
            "bundle": engine(clock, 1, 1),
            "wrong": engine(clock, 1, 1, deviation=0.6),
            "not a number": engine(clock, 1, 1, deviation=float("nan")),
            "broken": Contestant(fails, lambda _: 0.0, 0.5),
        }
    )
    for timing in timings:
        assert timing.wrong == ["wrong", "not a number"]
        assert timing.failed == {"broken": "RuntimeError: no such kernel"}
        assert "broken" not in timing.ratios
    with pytest.raises(RuntimeError):  # without the bundle there is nothing to compare
        measured({"bundle": Contestant(fails, lambda _: 0.0, 0.5), "other": engine(clock, 1, 1)})


@pytest.mark.parametrize("call", [2, 3, 5])
def test_an_engine_that_fails_later_has_no_figures(clock: Clock, call: int) -> None:
    """In its second warm-up, its first sample or its third."""
    calls = itertools.count(1)

    def fails_later(lap: Callable[[str], None]) -> None:
        clock.sleep(1)
        if next(calls) == call:
            raise RuntimeError("out of memory")

    whole, *_ = measured({"bundle": engine(clock, 1, 1), "broken": Contestant(fails_later, lambda _: 0.0, 0.5)})
    assert whole.failed == {"broken": "RuntimeError: out of memory"}
    assert whole.seconds.keys() == whole.deviations.keys() == whole.bounds.keys() == {"bundle"}
    assert whole.rounds == 3
    assert next(calls) == call + 1  # it was not called again


def test_noisy_ratios_are_measured_again(clock: Clock) -> None:
    seconds = itertools.cycle([1, 4])
    scattered = Contestant(lambda lap: clock.sleep(next(seconds)), lambda _: 0.0, 0.5)
    (timing,) = measure(Case(PART, {"scattered": scattered, "bundle": engine(clock, 1, 1)}, "bundle"), 4, silent, 2)
    assert timing.rounds == 12
    assert timing.interquartile_range["scattered"] > measurement.NOISY


def test_a_sample_disturbed_by_others_is_noticed_and_taken_again() -> None:
    work = Contestant(lambda lap: busy(0.3), lambda _: 0.0, 0.5)
    others = [
        subprocess.Popen(
            [sys.executable, "-c", "print('begun', flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
        )
        for _ in range(2 * (os.cpu_count() or 1))
    ]  # fmt: skip
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        (timing,) = measure(Case(PART, {"bundle": work}, "bundle"), 1, silent, 1)
        (quick,) = measure(Case(PART, {"bundle": work}, "bundle"), 1, silent, 0)
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert timing.retries == measurement.RETRIES
    assert timing.disturbed == 1
    assert (quick.retries, quick.disturbed) == (0, 1)
