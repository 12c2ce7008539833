"""The compared variants: the paper's regimes, and the controls that distinguish adaptation from capacity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import Protocol, TrainedRegime
from chameleon_deploy.evaluate import conditioning
from chameleon_deploy.evaluate.conditioning import Conditioning
from chameleon_deploy.reference import hypernetwork
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig, build_factors
from chameleon_deploy.reference.clustering import nearest_centroids
from chameleon_deploy.reference.hypernetwork import num_factors
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.presets import Preset
from chameleon_deploy.reference.targets import target_specs

# The conditionings of a text: the keys of stored scores and of `--json`. Each has a label in figures.py.
ConditioningName = Literal[
    "none",
    "static",
    "constant",
    "request",
    "centroid",
    "cohort_4",
    "cohort_32",
    "mixed_32",
    "other_cluster",
    "shuffled",
]


class Variant(msgspec.Struct, frozen=True):
    """One way to train.

    constant  the hypernetwork gets one constant vector, so that it has its capacity and nothing to adapt to
    large     a LoRA with as many parameters as the hypernetwork
    """

    name: str
    regime: TrainedRegime
    constant: bool = False
    large: bool = False


VARIANTS = (
    Variant("lora", "lora"),
    Variant("chameleon", "chameleon"),
    Variant("chameleon-constant", "chameleon", constant=True),
    Variant("lora-large", "lora", large=True),
)


def checkpoint_config(
    variant: Variant, settings: Preset, trunk: Trunk, base_model: str, protocol: Protocol
) -> CheckpointConfig:
    return CheckpointConfig(
        regime=variant.regime,
        base_model=base_model,
        rank=large_rank(trunk, settings) if variant.large else settings.rank,
        alpha=settings.alpha,
        hidden_sizes=hidden_sizes(variant, settings) if variant.regime == "chameleon" else (),
        num_clusters=num_clusters(variant, settings),
        protocol=protocol,
        max_length=settings.max_length,
        targets=settings.targets,
        architecture=settings.architecture,
    )


def num_clusters(variant: Variant, settings: Preset) -> int:
    return 1 if variant.constant else settings.num_clusters


def hidden_sizes(variant: Variant, settings: Preset) -> tuple[int, ...]:
    return settings.hidden_sizes(num_clusters(variant, settings))


def large_rank(trunk: Trunk, settings: Preset) -> int:
    """Return the rank, rounded, of a LoRA that has as many parameters as the hypernetwork."""
    per_rank = num_factors(target_specs(trunk, settings.targets), 1)
    return round(num_parameters(trunk, settings, VARIANTS[1]) / per_rank)


def num_parameters(trunk: Trunk, settings: Preset, variant: Variant) -> int:
    with torch.device("meta"):  # shapes only
        return hypernetwork.num_parameters(
            build_factors(checkpoint_config(variant, settings, trunk, "", "masked"), trunk)
        )


def conditionings(
    variant: Variant, checkpoint: Checkpoint, embeddings: Tensor, centroids: Tensor, seed: int
) -> Iterator[tuple[ConditioningName, Conditioning]]:
    """Return every conditioning of texts with these embeddings [texts, hidden], the usual one first."""
    if variant.regime == "lora":
        yield "static", conditioning.constant(embeddings[0], len(embeddings))
        return
    if variant.constant:
        yield "constant", conditioning.constant(checkpoint.centroids[0], len(embeddings))
        return
    clusters = nearest_centroids(embeddings, centroids)
    cohort = conditioning.cohort_mean(embeddings, clusters, 32)
    yield "cohort_32", cohort
    yield "cohort_4", conditioning.cohort_mean(embeddings, clusters, 4)
    yield "request", conditioning.own_embedding(embeddings)
    yield "centroid", conditioning.own_centroid(centroids, clusters)
    yield "mixed_32", conditioning.mixed_mean(embeddings, 32)
    yield "other_cluster", conditioning.other_cluster_mean(embeddings, clusters)
    yield "shuffled", conditioning.shuffled(cohort, seed)


def usual(variant: Variant) -> ConditioningName:
    """Return the conditioning of the paper's table."""
    return "static" if variant.regime == "lora" else "constant" if variant.constant else "cohort_32"
