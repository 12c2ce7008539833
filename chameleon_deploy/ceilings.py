"""What this machine can do at most, measured: the floor that a benchmark's times stand on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 2**30
MATRIX = 2048
ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_second of reading memory, flops_per_second of a float32 matrix product: the best of several rounds."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, num_bytes: float, num_flops: float) -> float:
        """Seconds that no engine can beat which reads these bytes and computes these products."""
        return max(num_bytes / self.bytes_per_second, num_flops / self.flops_per_second)


def measure_ceilings(threads: int) -> Ceilings:
    """Both ceilings with `threads` threads."""
    torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4)
    left, right = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    return Ceilings(
        bytes_per_second=READ_BYTES / _best(lambda: values.sum()),
        flops_per_second=2 * MATRIX**3 / _best(lambda: left @ right),
    )


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
