"""Text embeddings and frozen k-means centroids (docs/design.md section 2), in PyTorch and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.errors import InputError


def embed_text(token_ids: Tensor, token_embedding: Tensor) -> Tensor:
    """Return e = p / (||p|| + 1e-8), where p is the mean token embedding.  token_ids int64 [n] -> [hidden]"""
    pooled = token_embedding[token_ids].mean(0)
    embedding: Tensor = pooled / (torch.linalg.vector_norm(pooled) + 1e-8)
    return embedding


def pooled_token_ids(token_ids: Sequence[int], protocol: str, max_length: int, eos_token_id: int) -> Tensor:
    """Return the ids that are pooled: the text itself (`masked`), or padded with EOS to max_length (`paper`)."""
    ids = list(token_ids)
    if protocol == "paper":
        ids += [eos_token_id] * (max_length - len(ids))
    return torch.tensor(ids, dtype=torch.int64)


def embed_texts(
    texts: Sequence[Sequence[int]], token_embedding: Tensor, protocol: str, max_length: int, eos_token_id: int
) -> Tensor:
    """Return text embeddings [batch, hidden] of lists of token ids."""
    return torch.stack(
        [embed_text(pooled_token_ids(ids, protocol, max_length, eos_token_id), token_embedding) for ids in texts]
    )


def nearest_centroids(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """Return argmin_k ||e - mu_k||^2, ties to the lowest k.  [batch, hidden], [K, hidden] -> int64 [batch]"""
    # The matrix-multiplication form of the distance suffers from cancellation; ties must be exact.
    distances = torch.cdist(embeddings.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(1)


def fit_centroids(embeddings: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Return k-means centroids float32 [K, hidden]; every cluster has at least one text.

    Raises InputError if there are fewer different texts than clusters.
    """
    from sklearn.cluster import KMeans

    points = embeddings.numpy()
    distinct = len(np.unique(points, axis=0))
    if distinct < num_clusters:
        raise InputError(
            f"{distinct} different texts cannot fill {num_clusters} clusters: pass at most --clusters {distinct}"
        )
    kmeans = KMeans(num_clusters, n_init=4, random_state=seed).fit(points)
    centroids = torch.from_numpy(kmeans.cluster_centers_.astype(np.float32))
    sizes = torch.bincount(nearest_centroids(embeddings, centroids), minlength=num_clusters)
    if (sizes == 0).any():
        raise InputError(
            f"k-means left {int((sizes == 0).sum())} of {num_clusters} clusters empty: pass fewer --clusters"
        )
    return centroids
