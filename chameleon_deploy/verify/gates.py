"""The numeric gates of every precision (DESIGN section 8), and a figure against its limit."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """Limits of one precision; None is reported and not limited."""

    max_abs_logit: float | None
    top1_agreement: float  # share of positions, where the reference's top-1 gap exceeds top1_gap
    top1_gap: float
    kl_mean: float
    kl_p999: float
    perplexity: float  # relative
    rounding: float  # how far two orders of the same sums may lie apart in a logit


GATES = {
    "fp32": Gate(5e-4, 1.0, 1e-3, 1e-7, 1e-5, 1e-4, 5e-4),
    "fp16": Gate(None, 0.997, 1e-2, 1e-4, 5e-3, 1e-3, 5e-2),
    "bf16": Gate(None, 0.995, 1e-1, 5e-4, 1e-2, 5e-3, 3e-1),
    "int8": Gate(None, 0.99, 1e-1, 1e-3, 2e-2, 1e-2, 3e-1),  # a last bit can decide how a value is rounded
}
TENSORRT_FP32 = Gate(1e-3, 0.9999, 1e-3, 1e-6, 1e-4, 2e-4, 1e-3)  # its kernels sum in other orders


@dataclass(frozen=True)
class Check:
    """One figure against its limit; `at_least` turns the comparison round, limit None is information.

    A figure that is not finite passes neither.
    """

    name: str
    value: float
    limit: float | None
    at_least: bool = False
    note: str = ""
    graph: str = ""  # the decoder graph that it was measured on

    @property
    def passed(self) -> bool:
        if self.limit is None or not math.isfinite(self.value):
            return math.isfinite(self.value)
        return self.value >= self.limit if self.at_least else self.value <= self.limit
