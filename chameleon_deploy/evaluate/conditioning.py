"""The conditioning of each text when a whole set of texts is scored.

It covers the modes of docs/design.md section 3, and the controls that distinguish adaptation from capacity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from chameleon_deploy.reference.fit import cohorts


@dataclass(frozen=True)
class Conditioning:
    """Conditioning vectors [sets, hidden], and the vector of each text: ids int64 [texts]."""

    vectors: Tensor
    ids: Tensor

    def rows(self, batch_size: int) -> Iterable[tuple[Tensor, list[int]]]:
        """Yield every vector with its texts, at most batch_size at a time."""
        for vector, members in zip(self.vectors, members_of(self.ids, len(self.vectors)), strict=True):
            for rows in cohorts([members], batch_size):
                yield vector, rows


def members_of(ids: Tensor, count: int) -> list[Tensor]:
    """Return the texts of each of `count` ids: int64 tensors, together [texts]."""
    return [(ids == k).nonzero().flatten() for k in range(count)]


def constant(vector: Tensor, num_texts: int) -> Conditioning:
    """Use the same vector [hidden] for every text."""
    return Conditioning(vector[None], torch.zeros(num_texts, dtype=torch.int64))


def own_centroid(centroids: Tensor, cluster_ids: Tensor) -> Conditioning:
    """Mode centroid: use the frozen centroid of the text's cluster."""
    return Conditioning(centroids, cluster_ids)


def own_embedding(embeddings: Tensor) -> Conditioning:
    """Mode request: use the text's own embedding, which is a cohort of one."""
    return Conditioning(embeddings, torch.arange(len(embeddings)))


def cohort_mean(embeddings: Tensor, cluster_ids: Tensor, size: int) -> Conditioning:
    """Mode cohort: use the mean of a batch of `size` texts of one cluster, drawn in the order of the texts."""
    clusters = members_of(cluster_ids, int(cluster_ids.max()) + 1)
    return _means(embeddings, cohorts(clusters, size))


def mixed_mean(embeddings: Tensor, size: int) -> Conditioning:
    """Control: use batches of `size` in the order of the texts, regardless of their clusters."""
    return _means(embeddings, cohorts([torch.arange(len(embeddings))], size))


def other_cluster_mean(embeddings: Tensor, cluster_ids: Tensor) -> Conditioning:
    """Control: use the mean of all texts of the next cluster that is not empty; the first follows the last."""
    present, index = cluster_ids.unique(return_inverse=True)
    own = _means(embeddings, (rows.tolist() for rows in members_of(index, len(present))))
    return Conditioning(own.vectors, (own.ids + 1) % len(present))


def shuffled(conditioning: Conditioning, seed: int) -> Conditioning:
    """Control: use the same vectors, assigned to the texts at random."""
    order = torch.randperm(len(conditioning.ids), generator=torch.Generator().manual_seed(seed))
    return Conditioning(conditioning.vectors, conditioning.ids[order])


def _means(embeddings: Tensor, batches: Iterable[list[int]]) -> Conditioning:
    vectors, ids = [], torch.empty(len(embeddings), dtype=torch.int64)
    for number, rows in enumerate(batches):
        ids[rows] = number
        vectors.append(embeddings[rows].mean(0))
    return Conditioning(torch.stack(vectors), ids)
