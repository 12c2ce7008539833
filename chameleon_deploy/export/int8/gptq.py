"""GPTQ: weights of 8 or 4 bits whose rounding errors compensate each other on real activations.

Input channels are rounded in order; each rounding error is compensated by the channels not yet rounded. Source: Frantar
et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(https://arxiv.org/abs/2210.17323). Channels compensate within groups of 768.

8 bits have one scale for each output channel; 4 bits have one for every 32 weights of it, which is chosen when the
errors before them have been compensated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST = 127  # -128 is not used: the scale is the same on both sides of zero
INT4 = -8, 7
BLOCK = 32  # weights of an output channel that share a scale in 4 bits
# Largest weights of a block in steps that are tried: beyond 7.5 what is largest is cut off, and the rest is finer.
REACHES = tuple(6.5 + 0.25 * i for i in range(15))
DAMPING = 0.02  # share of the activations' mean square that is added to each, so that rare channels do not change
COLUMNS = 4096  # of the matrix that are rounded together, so that they stay in the processor's cache


@torch.no_grad()
def round_weights(matrix: Tensor, products: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return int8 [in, out] and float32 scale [out] of a float32 [in, out] matrix, which is nearly int8 * scale.

    products  of the activations with each other (calibration.Products)
    """
    scale, int8 = column_scales(matrix), torch.empty(matrix.shape, dtype=torch.int8)
    with _one_thread():
        for follow, rows in _groups(products):
            for parts in zip(*(part.split(COLUMNS, -1) for part in (matrix[rows], int8[rows], scale)), strict=True):
                columns, rounded_columns, scales = parts
                _round(columns.clone(memory_format=torch.contiguous_format), follow, scales, rounded_columns)
    return int8, scale


@torch.no_grad()
def round_blocks(matrix: Tensor, products: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return values of 4 bits, -8 to 7, as int8 [in, out], and float32 scales [in / 32, out], whose product is nearly a
    float32 [in, out] matrix.

    products  see `round_weights`
    """
    int4 = torch.empty(matrix.shape, dtype=torch.int8)
    scale = torch.empty(len(matrix) // BLOCK, matrix.shape[1])
    with _one_thread():
        for follow, rows in _groups(products):
            blocks = slice(rows.start // BLOCK, rows.stop // BLOCK)
            parts = (part.split(COLUMNS, -1) for part in (matrix[rows], int4[rows], scale[blocks]))
            for columns, rounded_columns, scales in zip(*parts, strict=True):
                _round_blocks(columns.clone(memory_format=torch.contiguous_format), follow, scales, rounded_columns)
    return int4, scale


def _groups(products: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice]]:
    """Yield how far errors move later channels of each group, and which channels those are."""
    start = 0
    for product in products:
        yield _follow(product), slice(start, start + len(product))
        start += len(product)


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


def block_scales(block: Tensor) -> Tensor:
    """Return the scales of 4-bit values of a block [32, out] with the smallest sum of squared errors, float32 [out]."""
    absmax = block.abs().amax(0)
    absmax[absmax < torch.finfo(torch.float32).tiny] = 1
    least, best = torch.full_like(absmax, torch.inf), absmax
    for reach in REACHES:
        scale = absmax / reach
        error = ((block / scale).round_().clamp_(*INT4).mul_(scale) - block).square_().sum(0)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _follow(product: Tensor) -> Tensor:
    """Return how far each later channel moves to compensate an error of an earlier one, float32 [earlier, later]."""
    damped = product.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + 1e-30)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    follow: Tensor = inverse / inverse.diagonal()[:, None]
    return follow


def _round_blocks(matrix: Tensor, follow: Tensor, scale: Tensor, int4: Tensor) -> None:
    """Round channels as `_round` does, with a scale of each block, which is written into scale [blocks, columns]."""
    if len(matrix) == BLOCK:
        scale[0] = block_scales(matrix)
        _round(matrix, follow, scale[0], int4, INT4)
        return
    half = len(matrix) // BLOCK // 2 * BLOCK
    _round_blocks(matrix[:half], follow[:half, :half], scale[: half // BLOCK], int4[:half])
    matrix[half:].addmm_(follow[:half, half:].T, matrix[:half], alpha=-1)
    _round_blocks(matrix[half:], follow[half:, half:], scale[half // BLOCK :], int4[half:])


def _round(
    matrix: Tensor, follow: Tensor, scale: Tensor, rounded: Tensor, ends: tuple[int, int] = (-LARGEST, LARGEST)
) -> None:
    """Round channels in order, into int8 [channels, columns] from the first to the second of two ends. The matrix
    becomes its errors.

    The second half is compensated for the first in one product: a rank-one update for each channel would read what
    remains of the matrix that many times.
    """
    if len(matrix) == 1:
        rounded.copy_((matrix / scale).round_().clamp_(*ends))
        matrix.addcmul_(rounded, scale, value=-1)
        return
    half = len(matrix) // 2
    _round(matrix[:half], follow[:half, :half], scale, rounded[:half], ends)
    matrix[half:].addmm_(follow[:half, half:].T, matrix[:half], alpha=-1)
    _round(matrix[half:], follow[half:, half:], scale, rounded[half:], ends)
