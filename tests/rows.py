"""Rows of random token ids."""

from __future__ import annotations

import numpy as np


def random_rows(seed: int, batch: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, rng.integers(1, longest + 1)).tolist() for _ in range(batch)]
