"""Detect whether other processes use the processors while something is timed."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SETTLE_SECONDS = 0.5  # maximum between samples, until the worker threads of the last engine stop spinning


@dataclass(frozen=True)
class Processors:
    """Seconds of processor time so far.

    The fields count the time used by all processes, used by this one, stolen by other virtual machines of the host, and
    spent by this process's threads waiting while they were ready to run.
    """

    used: float
    own: float
    stolen: float
    waited: float

    @classmethod
    def now(cls) -> Processors:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        tick, own, waited = os.sysconf("SC_CLK_TCK"), os.times(), 0
        for task in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                waited += int((task / "schedstat").read_text().split()[1])
        return cls((user + nice + system + irq + softirq) / tick, own.user + own.system, steal / tick, waited / 1e9)

    def lost_since(self, before: Processors) -> float:
        """Return the seconds that others took from this process.

        A thread that waits for another one of this process loses nothing, nor does an idle processor that another
        process uses.
        """
        by_others = (self.used - before.used) - (self.own - before.own)
        return self.stolen - before.stolen + min(by_others, self.waited - before.waited)


def settle() -> None:
    """Wait until the threads of this process are idle."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(0.01)
        if time.process_time() - used < 0.002:
            return
