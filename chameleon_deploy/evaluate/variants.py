"""What is compared: the paper's regimes, and the controls that tell adaptation from capacity."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import msgspec
from torch import Tensor

from chameleon_deploy.bundle import Protocol, Regime
from chameleon_deploy.evaluate import conditioning
from chameleon_deploy.evaluate.conditioning import Conditioning
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig
from chameleon_deploy.reference.clustering import nearest_centroids
from chameleon_deploy.reference.hypernetwork import num_factors
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.presets import RECIPES

COHORT_SIZES = (4, 32)  # a cohort of one is mode request


class Variant(msgspec.Struct, frozen=True):
    """One way to train. constant: the hypernetwork is fed one constant vector, so it has its capacity and nothing to
    adapt to. large: a LoRA of as many parameters as the hypernetwork."""

    name: str
    regime: Regime
    constant: bool = False
    large: bool = False


VARIANTS = (
    Variant("lora", "lora"),
    Variant("chameleon", "chameleon"),
    Variant("chameleon-constant", "chameleon", constant=True),
    Variant("lora-large", "lora", large=True),
)


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
    """The settings; the defaults are the paper's, where it gives one."""

    recipe: Literal["paper", "residual"] = "paper"  # of the hypernetworks: reference/recipes.py
    rank: int = 4
    alpha: float = 1.0
    num_clusters: int = 8
    max_length: int = 256
    epochs: int = 10
    batch_size: int = 32
    lr: float = 5e-4
    patience: int = 2
    seed: int = 0  # of the first training; the others follow


def checkpoint_config(
    variant: Variant, settings: Experiment, trunk: Trunk, base_model: str, protocol: Protocol
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
    )


def num_clusters(variant: Variant, settings: Experiment) -> int:
    return 1 if variant.constant else settings.num_clusters


def hidden_sizes(variant: Variant, settings: Experiment) -> tuple[int, ...]:
    return RECIPES[settings.recipe].hidden_sizes(num_clusters(variant, settings))


def large_rank(trunk: Trunk, settings: Experiment) -> int:
    """The rank of a LoRA that has as many parameters as the hypernetwork, to the nearest rank."""
    vocab_size, hidden_size = trunk.head_weight.shape
    return round(num_parameters(trunk, settings, VARIANTS[1]) / num_factors(hidden_size, vocab_size, 1))


def num_parameters(trunk: Trunk, settings: Experiment, variant: Variant) -> int:
    vocab_size, hidden_size = trunk.head_weight.shape
    if variant.regime == "chameleon":
        sizes = [hidden_size, *hidden_sizes(variant, settings), num_factors(hidden_size, vocab_size, settings.rank)]
        return sum((i + 1) * o for i, o in pairwise(sizes))
    return num_factors(hidden_size, vocab_size, large_rank(trunk, settings) if variant.large else settings.rank)


def conditionings(
    variant: Variant, checkpoint: Checkpoint, embeddings: Tensor, centroids: Tensor, seed: int
) -> Iterator[tuple[str, Conditioning]]:
    """Every way in which texts of these embeddings [texts, hidden] can be conditioned, the usual one first."""
    if variant.regime == "lora":
        yield "static", conditioning.constant(embeddings[0], len(embeddings))
        return
    if variant.constant:
        yield "constant", conditioning.constant(checkpoint.centroids[0], len(embeddings))
        return
    clusters = nearest_centroids(embeddings, centroids)
    cohorts = {size: conditioning.cohort_mean(embeddings, clusters, size) for size in COHORT_SIZES}
    yield usual(variant), cohorts[32]
    yield "cohort of 4", cohorts[4]
    yield "request", conditioning.own_embedding(embeddings)
    yield "centroid", conditioning.own_centroid(centroids, clusters)
    yield "mixed batch of 32", conditioning.mixed_mean(embeddings, 32)
    yield "another cluster's mean", conditioning.other_cluster_mean(embeddings, clusters)
    yield "shuffled", conditioning.shuffled(cohorts[32], seed)


def usual(variant: Variant) -> str:
    """The conditioning of the paper's table."""
    return "static" if variant.regime == "lora" else "constant" if variant.constant else "cohort of 32"
