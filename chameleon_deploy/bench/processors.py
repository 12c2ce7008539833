"""Detect whether other processes use the processors while something is timed.

An engine may run in a child of this process: its processor time is the engine's own.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SETTLE_SECONDS = 0.5  # maximum between samples, until the worker threads of the last engine stop spinning


@dataclass(frozen=True)
class Processors:
    """Seconds of processor time so far.

    The fields count the time used by all processes, used by this one and its children, stolen by other virtual machines
    of the host, and spent by threads of this one and its children waiting while they were ready to run.
    """

    used: float
    own: float
    stolen: float
    waited: float

    @classmethod
    def now(cls) -> Processors:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        tick, waited = os.sysconf("SC_CLK_TCK"), 0
        for pid in own_processes():
            for file in Path("/proc").glob(f"{pid}/task/*/schedstat"):
                with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                    waited += int(file.read_text().split()[1])
        return cls((user + nice + system + irq + softirq) / tick, _used(), steal / tick, waited / 1e9)

    def lost_since(self, before: Processors) -> float:
        """Return the seconds that others took from this process and its children.

        A thread that waits for another one of these loses nothing, nor does an idle processor that another process
        uses.
        """
        by_others = (self.used - before.used) - (self.own - before.own)
        return self.stolen - before.stolen + min(by_others, self.waited - before.waited)


def settle() -> None:
    """Wait until the threads of this process and its children are idle."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < deadline:
        used = _used()
        time.sleep(0.01)
        if _used() - used < 0.002:
            return


def own_processes() -> list[int]:
    """Return the ids of this process and of its children that `multiprocessing` started."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def _used() -> float:
    """Return the processor seconds of this process and its children so far."""
    seconds = 0.0
    for pid in own_processes():
        with suppress(OSError):  # a process that has just ended
            seconds += time.clock_gettime(~pid << 3 | 2)  # the clock that clock_getcpuclockid of C returns
    return seconds
