"""GPTQ: int8 weights whose rounding errors compensate each other on real activations.

Input channels are rounded in order; each rounding error is compensated by the channels not yet rounded. Source: Frantar
et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(https://arxiv.org/abs/2210.17323). Channels compensate within groups of 768.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 127  # -128 is not used: the scale is the same on both sides of zero
DAMPING = 0.02  # share of the activations' mean square that is added to each, so that rare channels do not change
LAZY = 32  # channels after which the rest of a group is updated


@torch.no_grad()
def round_weights(matrix: Tensor, products: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return int8 [in, out] and float32 scale [out] of a float32 [in, out] matrix, which is nearly int8 * scale.

    products  of the activations with each other (calibration.Activations)
    """
    scale = column_scales(matrix)
    groups = matrix.split([len(product) for product in products])
    rounded = [_round_group(group.clone(), product, scale) for group, product in zip(groups, products, strict=True)]
    return torch.cat(rounded), scale


def column_scales(matrix: Tensor) -> Tensor:
    """Return the scale of each column's int8 values, float32 [out]."""
    scale = matrix.abs().amax(0) / LARGEST
    scale[scale < torch.finfo(torch.float32).tiny] = 1  # a column of zeros, or close to it, becomes zeros
    return scale


def _round_group(matrix: Tensor, product: Tensor, scale: Tensor) -> Tensor:
    """Round a group of channels. Overwrites the matrix."""
    n = len(matrix)
    damped = product.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-30)
    # Row i of this factor says how far each later channel moves to compensate an error of channel i.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    follow = inverse / inverse.diagonal()[:, None]
    rounded = torch.empty(matrix.shape, dtype=torch.int8)
    for start in range(0, n, LAZY):
        stop = min(start + LAZY, n)
        errors = torch.empty(stop - start, matrix.shape[1])
        for i in range(start, stop):
            row = (matrix[i] / scale).round_().clamp_(-LARGEST, LARGEST)
            rounded[i] = row
            errors[i - start] = matrix[i] - row * scale
            matrix[i + 1 : stop].addr_(follow[i, i + 1 : stop], errors[i - start], alpha=-1)
        matrix[stop:].addmm_(follow[start:stop, stop:].T, errors, alpha=-1)
    return rounded
