"""Rows of the token embedding as they are stored, and what their sums are made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chameleon_deploy.contract.token_embedding import Int8Rows, TokenEmbedding, rotate
from chameleon_deploy.export import hadamard

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("channels", "block"), [(192, 64), (48, 16), (20, 4), (7, 1)])
def test_the_rotation_is_that_of_export(channels: int, block: int) -> None:
    x = RANDOM.standard_normal(channels)
    expected = hadamard.rotate(torch.from_numpy(x).float(), block).numpy()
    np.testing.assert_allclose(rotate(x, block), expected, atol=1e-5)
    np.testing.assert_allclose(rotate(rotate(x, block), block), x, atol=1e-12)


def test_a_sum_of_int8_rows_is_restored() -> None:
    embedding = RANDOM.standard_normal((9, 64)).astype(np.float32)
    channels = RANDOM.uniform(0.5, 2, 64).astype(np.float32)
    rotated = np.stack([rotate(row, 64) for row in embedding.astype(np.float64)]) / channels
    scales = np.abs(rotated).max(1) / 127
    stored = np.rint(rotated / scales[:, None]).astype(np.int8)
    table = TokenEmbedding(stored, Int8Rows(scales.astype(np.float32), channels, 64))
    ids = np.array([3, 3, 8])
    found = table.restore(table.rows(ids).sum(0))
    expected = embedding[ids].astype(np.float64).sum(0)
    assert 0 < np.abs(found - expected).max() < 0.1
    plain = TokenEmbedding(embedding)
    assert (plain.restore(plain.rows(ids).sum(0)) == expected).all()
