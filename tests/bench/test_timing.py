"""Timing: ratios of neighbours, the share of the floor, failures, scatter and samples that others disturbed."""

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
from chameleon_deploy.bench.ceilings import Ceilings
from chameleon_deploy.bench.timing import Case, Engine, Part, Timing, measure

PART = Part("work", 10, "unit", 1e7, 2e7)


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


def steady() -> Ceilings:
    return Ceilings(1e9, 1e9, "float32")


def silent(what: str, done: int, total: int) -> None:
    pass


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def engine(clock: Clock, first: float, second: float, deviation: float = 0.0) -> Engine:
    def work(lap: Callable[[str], None]) -> None:
        for part, seconds in (("a", first), ("b", second), ("a", first)):
            clock.sleep(seconds)
            lap(part)

    return Engine(work, lambda _: deviation, 0.5)


def measured(engines: dict[str, Engine]) -> list[Timing]:
    parts = {"a": replace(PART, name="a"), "b": replace(PART, name="b")}
    return measure(Case(PART, engines, parts), steady, 3, silent, 0)


def test_the_whole_and_its_parts_are_timed(clock: Clock) -> None:
    whole, a, b = measured({"bundle": engine(clock, 1, 4), "slow": engine(clock, 2, 4)})
    assert [whole.part.name, a.part.name, b.part.name] == ["work", "a", "b"]
    assert a.seconds == pytest.approx({"bundle": 2, "slow": 4})  # two stretches together
    assert whole.seconds == pytest.approx({"bundle": 6, "slow": 8})
    assert [t.ratios["slow"] for t in (whole, a, b)] == pytest.approx([4 / 3, 2, 1])
    assert whole.spread == pytest.approx({"bundle": 0, "slow": 0}, abs=1e-9)
    assert whole.floor == 0.02  # the larger of 10 ms of reading and 20 ms of computing
    assert whole.rounds == 3


def test_ratios_are_of_neighbours(clock: Clock) -> None:
    """A machine that becomes slower and slower changes the seconds, and hardly the ratios: ten engines run between the
    first sample of a round and the last."""

    def work(seconds: float) -> Engine:
        return Engine(lambda lap: clock.sleep(seconds * (1 + clock.seconds / 200)), lambda _: 0.0, 0.5)

    engines = {"bundle": work(1), "other": work(1)} | {f"slow {i}": work(3) for i in range(8)}
    (timing,) = measure(Case(PART, engines), steady, 5, silent, 0)
    assert timing.ratios["other"] == pytest.approx(1, abs=0.01)
    assert timing.spread["other"] < 0.02
    assert timing.spread["bundle"] > 0.3


def test_the_share_of_the_floor_is_taken_within_a_round(clock: Clock) -> None:
    """A machine that becomes faster lowers the floor, and changes no engine's distance to it."""
    speed = {"now": 1.0}

    def faster(what: str, done: int, total: int) -> None:
        speed["now"] *= 1.5

    def ceilings() -> Ceilings:
        return Ceilings(1e9 * speed["now"], 1e9 * speed["now"], "float32")

    work = Engine(lambda lap: clock.sleep(0.08 / speed["now"]), lambda _: 0.0, 0.5)
    (timing,) = measure(Case(PART, {"bundle": work}), ceilings, 5, faster, 0)
    assert timing.share == pytest.approx(0.25)
    assert timing.floor < 0.02  # of the round in the middle


def test_a_wrong_answer_and_a_failure_are_told_apart(clock: Clock) -> None:
    def fails(lap: Callable[[str], None]) -> None:
        raise RuntimeError("no such\nkernel")

    timings = measured(
        {
            "bundle": engine(clock, 1, 1),
            "wrong": engine(clock, 1, 1, deviation=0.6),
            "not a number": engine(clock, 1, 1, deviation=float("nan")),
            "broken": Engine(fails, lambda _: 0.0, 0.5),
        }
    )
    for timing in timings:
        assert timing.wrong == ["wrong", "not a number"]
        assert timing.failed == {"broken": "RuntimeError: no such kernel"}
        assert "broken" not in timing.ratios
    with pytest.raises(RuntimeError):  # without the bundle there is nothing to compare
        measured({"broken": Engine(fails, lambda _: 0.0, 0.5), "other": engine(clock, 1, 1)})


def test_scattered_ratios_are_measured_again(clock: Clock) -> None:
    seconds = itertools.cycle([1, 4])
    scattered = Engine(lambda lap: clock.sleep(next(seconds)), lambda _: 0.0, 0.5)
    (timing,) = measure(Case(PART, {"bundle": engine(clock, 1, 1), "scattered": scattered}), steady, 4, silent, 2)
    assert timing.rounds == 12
    assert timing.spread["scattered"] > measurement.NOISY


def test_a_sample_disturbed_by_others_is_noticed_and_taken_again() -> None:
    work = Engine(lambda lap: busy(0.3), lambda _: 0.0, 0.5)
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
        (timing,) = measure(Case(PART, {"bundle": work}), steady, 1, silent, 1)
        (quick,) = measure(Case(PART, {"bundle": work}), steady, 1, silent, 0)
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert timing.retries == measurement.RETRIES
    assert timing.disturbed == 1
    assert (quick.retries, quick.disturbed) == (0, 1)
