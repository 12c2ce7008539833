"""An engine for a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from chameleon_deploy.bench.peers import DECODE, PREFILL, Rows


class StandIn:
    """An engine whose calls show what crosses the pipe."""

    name, precision, size = "stand-in", "fp32", 7
    adapts, scores, generates, is_ablation = False, True, True, False

    def __init__(self, error: Exception | None = None) -> None:
        self._calls = 0
        if error:
            raise error

    def logits(self, ids: Any) -> Any:
        """Return the id of the process, once for each token."""
        return np.full(len(ids), os.getpid())

    def score(self, rows: Rows) -> Any:
        """Send the signal rows[1] in call rows[0]; otherwise use the processor for 0.2 s."""
        self._calls += 1
        if self._calls == rows[0][0]:
            os.kill(os.getpid(), rows[1][0])
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return np.zeros(1)

    def generate(self, rows: Rows, num_tokens: int, lap: Callable[[str], None]) -> Any:
        """Take a second for each token after the first."""
        if num_tokens < 1:
            raise ValueError(f"cannot generate {num_tokens} tokens")
        lap(PREFILL)
        time.sleep(num_tokens - 1)
        lap(DECODE)
        return np.full((len(rows), num_tokens), rows[0][0])
