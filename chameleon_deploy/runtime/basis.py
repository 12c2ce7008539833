"""Bring factors into the basis of a bundle's linear layers: int8 graphs rotate and scale what layers read and write.

    A' = ((A * in_before) H) * in_after        B' = (B H) * out_after

H is block diagonal with Hadamard matrices (export/hadamard.py); a block of 1 rotates nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.contract.manifest import AdaptationSpec, basis_names, factor_names
from chameleon_deploy.contract.token_embedding import rotate


def enter_basis(
    factors: Mapping[str, FloatArray], spec: AdaptationSpec, basis: Mapping[str, npt.NDArray[Any]]
) -> dict[str, FloatArray]:
    """Return factors [..., rank, width] of plain layers as factors of a bundle's layers.

    basis  tensors of basis.safetensors; a layer without any is plain
    """
    entered = dict(factors)
    for target in spec.targets:
        names = basis_names(target.name)
        name_A, name_B = factor_names(target.name)
        if names[0] not in basis or name_A not in factors:
            continue
        before, block, after, out_blocks, out = (basis[name] for name in names)
        entered[name_A] = rotate(factors[name_A] * before, int(block[0])) * after
        parts = np.split(factors[name_B], len(out_blocks), axis=-1)
        rotated = [rotate(part, int(size)) for part, size in zip(parts, out_blocks, strict=True)]
        entered[name_B] = np.concatenate(rotated, axis=-1) * out
    return entered
