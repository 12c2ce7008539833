"""Inference with the reference: adapt a batch in every mode, and compute its logits.

It is written from docs/design.md sections 2 and 3, independently of the runtime, so that a comparison proves something.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.clustering import embed_texts, nearest_centroids
from chameleon_deploy.reference.model import adapted_logits


@dataclass
class ReferenceAdaptation:
    """The reference's adaptation of a batch.

    embeddings   [batch, hidden]
    cluster_ids  [batch]
    lora_A       [clusters, rank, hidden]
    lora_B       [clusters, vocab, rank], as in the checkpoint, without alpha
    factor_ids   [batch]
    """

    embeddings: Tensor
    cluster_ids: Tensor
    lora_A: Tensor
    lora_B: Tensor
    factor_ids: Tensor


@torch.no_grad()
def adapt(
    checkpoint: Checkpoint, rows: Sequence[Sequence[int]], mode: str, tenants: Sequence[Hashable] | None = None
) -> ReferenceAdaptation:
    """Return the factors of a batch of token ids in one of the modes none, static (regime lora), centroid, request,
    cohort, tenant.
    """
    config, trunk = checkpoint.config, checkpoint.trunk
    embeddings = embed_texts(rows, trunk.token_embedding, config.protocol, config.max_length, trunk.eos_token_id)
    clusters = (
        nearest_centroids(embeddings, checkpoint.centroids) if config.num_clusters else torch.full((len(rows),), -1)
    )
    if mode in ("none", "static"):
        conditioning, factor_ids = embeddings[:1], torch.zeros(len(rows), dtype=torch.int64)
    elif mode == "centroid":
        conditioning, factor_ids = checkpoint.centroids, clusters
    elif mode == "request":
        conditioning, factor_ids = embeddings, torch.arange(len(rows))
    else:
        keys = [(tenants[i] if tenants else None, int(clusters[i])) for i in range(len(rows))]
        groups = list(dict.fromkeys(keys))
        factor_ids = torch.tensor([groups.index(key) for key in keys])
        conditioning = torch.stack([embeddings[factor_ids == g].mean(0) for g in range(len(groups))])
    lora_A, lora_B = checkpoint.factors(conditioning)
    if mode == "none":
        lora_A, lora_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    return ReferenceAdaptation(embeddings, clusters, lora_A, lora_B, factor_ids)


@dataclass
class RowLogits:
    """Logits [positions, vocab] of one row of a batch, computed alone: no padding, no cache.

    The trunk does not depend on the factors, so the hidden states of a text are computed once and stored. The logits of
    a long text are large: request a slice of its positions at a time.
    """

    checkpoint: Checkpoint
    hidden: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Return hidden states [1, sequence, hidden] of a text."""
        key = tuple(ids)
        if key not in self.hidden:
            self.hidden[key], _ = self.checkpoint.trunk.hidden_states(torch.tensor([key]))
        return self.hidden[key]

    @torch.no_grad()
    def __call__(
        self, ids: Sequence[int], adaptation: ReferenceAdaptation, row: int, positions: slice = slice(None)
    ) -> Tensor:
        alpha, ids_of_row = self.checkpoint.config.alpha, adaptation.factor_ids[row : row + 1]
        head_weight = self.checkpoint.trunk.head_weight
        return adapted_logits(
            self.read(ids)[:, positions], head_weight, adaptation.lora_A, adaptation.lora_B, alpha, ids_of_row
        )[0]
