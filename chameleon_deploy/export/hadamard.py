"""Hadamard rotations, which distribute an outlier over the channels of its block, so that int8 resolves all of them.

Blocks of channels are multiplied by a Hadamard matrix H. This one is symmetric, its own inverse, and its rows sum to
one (a regular Hadamard matrix, https://en.wikipedia.org/wiki/Regular_Hadamard_matrix). A rotated block therefore keeps
its mean, and a layer norm without weights commutes with the rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_BLOCK = 64  # channels rotated together
FOUR = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float32) / 2


def block_of(channels: int) -> int:
    """Return how many channels are rotated together: the largest power of four that divides them all, at most 64."""
    block = 1
    while block < LARGEST_BLOCK and channels % (4 * block) == 0:
        block *= 4
    return block


def hadamard(block: int) -> Tensor:
    """Return H, float32 [block, block] of entries +-block^-1/2, for a block that is a power of four."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(matrix, FOUR)
    return matrix


def rotate(x: Tensor, block: int | None = None) -> Tensor:
    """Return x H for x float32 [..., channels], in the largest possible blocks if `block` is None."""
    block = block or block_of(x.shape[-1])
    blocks: Tensor = x.unflatten(-1, (-1, block)) @ hadamard(block)
    return blocks.flatten(-2)
