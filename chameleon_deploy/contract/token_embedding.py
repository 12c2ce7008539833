"""The token embedding of a bundle, from which text embeddings are pooled.

int8 bundles store it once for the lookup and for the head: int8 rows with one scale each, rotated in blocks by the
regular Hadamard matrix. Values are exact in float64 and the rotation adds in a fixed order, so that Python and C++ pool
equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Int8Rows:
    """Parameters that turn int8 rows into rows of E: times the row's scale, times each channel's, rotated.

    rows      float32 [vocab]
    channels  float32 [hidden]
    rotation  channels that are rotated together
    """

    rows: npt.NDArray[np.float32]
    channels: npt.NDArray[np.float32]
    rotation: int


@dataclass(frozen=True)
class TokenEmbedding:
    """E [vocab, hidden], memory-mapped.

    stored  float32, float16 or int8 [vocab, hidden]
    int8    for int8 rows; None otherwise
    """

    stored: npt.NDArray[Any]
    int8: Int8Rows | None = None

    def rows(self, ids: npt.NDArray[np.int64]) -> Doubles:
        """Return rows times their scales, [n] -> float64 [n, hidden]: `restore` their sum."""
        rows: Doubles = np.asarray(self.stored[ids]).astype(np.float64)
        return rows if self.int8 is None else rows * np.asarray(self.int8.rows[ids])[:, None]

    def restore(self, pooled: Doubles) -> Doubles:
        """Return a sum of rows as a sum of rows of E, float64 [hidden]."""
        return pooled if self.int8 is None else rotate(pooled * self.int8.channels, self.int8.rotation)


def rotate(x: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    """Return x H, [..., channels], for blocks of a power of four channels.

    H is a Kronecker power of J/2 - R, where J is four by four of ones and R reverses four channels.
    """
    shape, stride = x.shape, 1
    while stride < block:
        fours = x.reshape(-1, 4, stride)
        half = (((fours[:, 0] + fours[:, 1]) + fours[:, 2]) + fours[:, 3]) / 2
        x = (half[:, None] - fours[:, ::-1]).reshape(-1)
        stride *= 4
    return x.reshape(shape)
