"""GPTQ: int8 weights whose rounding errors compensate each other on real activations.

Input channels are rounded in order; each rounding error is compensated by the channels not yet rounded. Source: Frantar
et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(https://arxiv.org/abs/2210.17323). Channels compensate within groups of 768.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST = 127  # -128 is not used: the scale is the same on both sides of zero
DAMPING = 0.02  # share of the activations' mean square that is added to each, so that rare channels do not change
COLUMNS = 4096  # of the matrix that are rounded together, so that they stay in the processor's cache


@torch.no_grad()
def round_weights(matrix: Tensor, products: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return int8 [in, out] and float32 scale [out] of a float32 [in, out] matrix, which is nearly int8 * scale.

    products  of the activations with each other (calibration.Products)
    """
    scale, int8 = column_scales(matrix), torch.empty(matrix.shape, dtype=torch.int8)
    groups = (part.split([len(product) for product in products]) for part in (matrix, int8))
    with _one_thread():
        for product, group, rounded in zip(products, *groups, strict=True):
            follow = _follow(product)
            for parts in zip(*(part.split(COLUMNS, -1) for part in (group, rounded, scale)), strict=True):
                columns, rounded_columns, scales = parts
                _round(columns.clone(memory_format=torch.contiguous_format), follow, scales, rounded_columns)
    return int8, scale


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread: most products are small, and at the end of each the fastest waits for the slowest,
    which on a busy machine takes a hundred times as long as the product.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def column_scales(matrix: Tensor) -> Tensor:
    """Return the scale of each column's int8 values, float32 [out]."""
    scale = matrix.abs().amax(0) / LARGEST
    scale[scale < torch.finfo(torch.float32).tiny] = 1  # a column of zeros, or close to it, becomes zeros
    return scale


def _follow(product: Tensor) -> Tensor:
    """Return how far each later channel moves to compensate an error of an earlier one, float32 [earlier, later]."""
    damped = product.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-30)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    follow: Tensor = inverse / inverse.diagonal()[:, None]
    return follow


def _round(matrix: Tensor, follow: Tensor, scale: Tensor, int8: Tensor) -> None:
    """Round channels in order, into int8 [channels, columns]. The matrix becomes its errors.

    The second half is compensated for the first in one product: a rank-one update for each channel would read what
    remains of the matrix that many times.
    """
    if len(matrix) == 1:
        int8.copy_((matrix / scale).round_().clamp_(-LARGEST, LARGEST))
        matrix.addcmul_(int8, scale, value=-1)
        return
    half = len(matrix) // 2
    _round(matrix[:half], follow[:half, :half], scale, int8[:half])
    matrix[half:].addmm_(follow[:half, half:].T, matrix[:half], alpha=-1)
    _round(matrix[half:], follow[half:, half:], scale, int8[half:])
