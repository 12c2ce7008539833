"""Weights rounded to the nearest int8 value."""

from __future__ import annotations

from typing import Any

import torch

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.export.int8.gptq import round_weights


def nearest(matrix: FloatArray) -> Any:
    """int8 and scale of a matrix whose activations have nothing to do with each other: each weight rounded alone."""
    int8, scale = round_weights(torch.from_numpy(matrix), [torch.eye(len(matrix))])
    return int8.numpy(), scale.numpy()
