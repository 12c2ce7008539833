"""Embedding, clustering and conditioning against docs/design.md section 2, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from chameleon_deploy.contract.bundle import AdaptationSpec, TargetSpec
from chameleon_deploy.contract.token_embedding import TokenEmbedding
from chameleon_deploy.errors import InputError, ModeError
from chameleon_deploy.runtime.adaptation import (
    assign,
    check_conditioning,
    check_tenants,
    conditioning,
    embed,
)

VOCAB_SIZE, HIDDEN, EOS = 7, 3, 2
TABLE = np.random.default_rng(0).standard_normal((VOCAB_SIZE, HIDDEN)).astype(np.float32)


def spec(protocol: Any, max_length: int = 4) -> AdaptationSpec:
    return AdaptationSpec("chameleon", 2, 1.0, (TargetSpec("lm_head", HIDDEN, VOCAB_SIZE),), 3, protocol, max_length)


def plain_embedding(ids: Sequence[int], table: Any) -> list[float]:
    pooled = [math.fsum(float(table[i][axis]) for i in ids) / len(ids) for axis in range(HIDDEN)]
    norm = math.sqrt(math.fsum(value * value for value in pooled))
    return [value / (norm + 1e-8) for value in pooled]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("ids", [[0], [1, 1], [0, 1, 3], [6, 5, 4, 3], [0, 1, 2, 3, 4, 5, 6]])
def test_embed(ids: list[int], dtype: Any) -> None:
    table = TABLE.astype(dtype)
    embedding = TokenEmbedding(table)
    found = embed([ids, [1]], embedding, spec("masked"), EOS)
    assert found.dtype == np.float32
    assert found.shape == (2, HIDDEN)
    np.testing.assert_allclose(found[0], plain_embedding(ids, table), rtol=1e-6)
    padded = ids + [EOS] * (4 - len(ids))
    np.testing.assert_allclose(
        embed([ids], embedding, spec("paper"), EOS)[0], plain_embedding(padded, table), rtol=1e-6
    )


def test_a_text_of_no_direction_has_the_embedding_zero() -> None:
    assert embed([[0]], TokenEmbedding(np.zeros_like(TABLE)), spec("masked"), EOS).tolist() == [[0.0] * HIDDEN]


def test_a_text_of_a_tiny_norm_has_a_smaller_embedding() -> None:
    """The 1e-8 beside the norm keeps a direction of rounding errors from counting in full."""
    table = np.array([[1e-8, 0, 0]], np.float32)
    np.testing.assert_allclose(embed([[0]], TokenEmbedding(table), spec("masked"), EOS), [[0.5, 0, 0]], rtol=1e-6)


def test_assign() -> None:
    centroids = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], np.float32)
    embeddings = np.array([[0.9, 0.1, 0], [0, 0.8, 0.5], [0.5, 0.5, 0], [-1, 0, 0]], np.float32)
    found = assign(embeddings, centroids)
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1, 0, 1]
    assert assign(embeddings, centroids[:0]).tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("tenants", "factor_ids"),
    [(None, [0, 1, 0, 1, 2]), (["b", "a", "b", "a", "a"], [0, 1, 0, 1, 2]),
     (["b", "a", "a", "b", "b"], [0, 1, 2, 3, 4]), ([1, True, 1.0, 1, 1], [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_conditioning_of_groups_is_their_mean(tenants: Any, factor_ids: list[int]) -> None:
    embeddings, cluster_ids = TABLE[:5], np.array([2, 0, 2, 0, 1])
    vectors, found = conditioning(embeddings, cluster_ids, tenants)
    assert found.dtype == np.int64
    assert found.tolist() == factor_ids
    for i, vector in enumerate(vectors):
        members = [row for row in range(5) if factor_ids[row] == i]
        expected = [math.fsum(float(TABLE[row][axis]) for row in members) / len(members) for axis in range(HIDDEN)]
        np.testing.assert_allclose(vector, expected, rtol=1e-6)


def test_tenants_are_for_their_mode_and_one_per_text() -> None:
    check_tenants("tenant", ["a", "b"], 2)
    check_tenants("tenant", np.array([1, 2]), 2)  # type: ignore[arg-type]
    check_tenants("cohort", None, 2)
    for mode, tenants, message in (
        ("tenant", None, "with no tenants"), ("cohort", ["a", "b"], "with tenants"),
        ("tenant", ["a"], "1 tenants for 2"),
        ("tenant", ["a"] * 3, "3 tenants for 2"), ("tenant", "ab", "a single str"), ("tenant", b"ab", "a single bytes"),
        ("tenant", [["a"], ["b"]], "tenant 0: unhashable"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            check_tenants(mode, tenants, 2)  # type: ignore[arg-type]


def test_vectors_of_a_caller_are_for_mode_request_of_bundles_that_take_them() -> None:
    found = check_conditioning("request", [[1, 2, 3], [4, 5, 6]], 3, 2)
    assert found is not None
    assert found.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found.dtype == np.float32
    assert check_conditioning("request", None, 0, 2) is None
    assert check_conditioning("none", None, 3, 2) is None
    assert check_conditioning("request", [[1.0]], 1, 1) is not None
    needs, takes_none = r"needs conditioning in mode 'request', float32 \[texts, 3\]", "takes no conditioning"
    for mode, vectors, size, message in (
        ("request", None, 3, f"without conditioning: this bundle {needs}"),
        ("none", [[0] * 3] * 2, 3, f"with conditioning: this bundle {needs}"),
        ("request", [[0] * 3] * 2, 0, f"with conditioning: this bundle {takes_none}"),
    ):
        with pytest.raises(ModeError, match=message):
            check_conditioning(mode, vectors, size, 2)  # type: ignore[arg-type]
    for wrong, message in (
        ([[0] * 3], r"shape \(1, 3\), expected \(2, 3\)"), ([[0] * 2] * 2, r"shape \(2, 2\)"),
        ([["x"] * 3] * 2, "no array of numbers"), ([[0] * 3, [0] * 2], "no array of numbers"),
        ([[0, 0, math.nan]] * 2, "NaN or infinity"), ([[0, 0, math.inf]] * 2, "NaN or infinity"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            check_conditioning("request", wrong, 3, 2)
