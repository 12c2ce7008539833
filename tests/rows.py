"""Rows of random token ids, and factors as a caller passes them."""

from __future__ import annotations

import numpy as np

from chameleon_deploy.contract.bundle import LM_HEAD, FloatArray, factor_names


def random_rows(seed: int, batch: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, rng.integers(1, longest + 1)).tolist() for _ in range(batch)]


def head_factors(lora_A: FloatArray, lora_B: FloatArray) -> dict[str, FloatArray]:
    """lora_A [rank, hidden] and lora_B [rank, vocab] of the head, under their names."""
    return dict(zip(factor_names(LM_HEAD), (lora_A, lora_B), strict=True))
