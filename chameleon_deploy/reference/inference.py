"""Inference with the reference: adapt a batch in every mode, and compute its logits.

It is written from docs/design.md sections 2 and 3, independently of the runtime, so that a comparison proves something.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.reference.adapters import adapted
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.clustering import embed_texts, nearest_centroids
from chameleon_deploy.reference.hypernetwork import FactorTensors, factor_set
from chameleon_deploy.reference.targets import in_head_alone


@dataclass
class ReferenceAdaptation:
    """The reference's adaptation of a batch.

    embeddings   [batch, hidden]
    cluster_ids  [batch]
    factors      "<target>.lora_A" [sets, rank, in_features] and "<target>.lora_B" [sets, out_features, rank], as in the
                 checkpoint, without alpha
    factor_ids   [batch]
    hidden       final hidden states by factor set and text, where they depend on the factors
    """

    embeddings: Tensor
    cluster_ids: Tensor
    factors: FactorTensors
    factor_ids: Tensor
    hidden: dict[tuple[int, tuple[int, ...]], Tensor] = field(init=False, default_factory=dict, repr=False)

    def with_B(self, change: Callable[[Tensor], Tensor]) -> ReferenceAdaptation:
        """Return the same adaptation with the lora_B of every target changed."""
        return replace(self, factors={n: change(f) if n.endswith(".lora_B") else f for n, f in self.factors.items()})


@torch.no_grad()
def adapt(
    checkpoint: Checkpoint,
    rows: Sequence[Sequence[int]],
    mode: str,
    tenants: Sequence[Hashable] | None = None,
    conditioning: FloatArray | None = None,
) -> ReferenceAdaptation:
    """Return the factors of a batch of token ids in one of the modes none, static (regime lora), centroid, request,
    cohort, tenant.

    conditioning  [batch, conditioning_size], mode request of a checkpoint with a conditioning_size
    """
    config, trunk = checkpoint.config, checkpoint.trunk
    embeddings = embed_texts(rows, trunk.token_embedding, config.protocol, config.max_length, trunk.eos_token_id)
    clusters = (
        nearest_centroids(embeddings, checkpoint.centroids) if config.num_clusters else torch.full((len(rows),), -1)
    )
    if mode in ("none", "static"):
        vectors = torch.zeros(1, config.conditioning_size or trunk.config.hidden_size)
        factor_ids = torch.zeros(len(rows), dtype=torch.int64)
    elif mode == "centroid":
        vectors, factor_ids = checkpoint.centroids, clusters
    elif mode == "request":
        vectors = embeddings if conditioning is None else torch.from_numpy(conditioning)
        factor_ids = torch.arange(len(rows))
    else:
        keys = [(tenants[i] if tenants else None, int(clusters[i])) for i in range(len(rows))]
        groups = list(dict.fromkeys(keys))
        factor_ids = torch.tensor([groups.index(key) for key in keys])
        vectors = torch.stack([embeddings[factor_ids == g].mean(0) for g in range(len(groups))])
    factors = checkpoint.factors(vectors)
    if mode == "none":
        factors = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    return ReferenceAdaptation(embeddings, clusters, factors, factor_ids)


@dataclass
class RowLogits:
    """Logits [positions, vocab] of one row of a batch, computed alone: no padding, no cache.

    Where the head alone is updated, the trunk does not depend on the factors, and the hidden states of a text are
    computed once for all. The logits of a long text are large: request a slice of its positions at a time.
    """

    checkpoint: Checkpoint
    hidden: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(
        self, ids: Sequence[int], adaptation: ReferenceAdaptation, row: int, positions: slice = slice(None)
    ) -> Tensor:
        factor_id, trunk = int(adaptation.factor_ids[row]), self.checkpoint.trunk
        with adapted(trunk, factor_set(adaptation.factors, factor_id, self.checkpoint.config.alpha)):
            if in_head_alone(self.checkpoint.config.targets):
                hidden = self.read(ids)
            else:
                key = (factor_id, tuple(ids))
                if key not in adaptation.hidden:
                    adaptation.hidden[key], _ = trunk.hidden_states(torch.tensor([list(ids)]))
                hidden = adaptation.hidden[key]
            return trunk.logits(hidden[0, positions])

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Return hidden states [1, sequence, hidden] of a text, which no factors change."""
        key = tuple(ids)
        if key not in self.hidden:
            self.hidden[key], _ = self.checkpoint.trunk.hidden_states(torch.tensor([key]))
        return self.hidden[key]
