"""Loss and perplexity of the three regimes under both protocols, on cached hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from chameleon_deploy.reference.checkpoint import Checkpoint, Protocol
from chameleon_deploy.reference.clustering import embed_texts, nearest_centroids
from chameleon_deploy.reference.corpus import encode_texts
from chameleon_deploy.reference.head import cohort_losses, cohorts
from chameleon_deploy.reference.hidden_states import cache_hidden_states
from chameleon_deploy.reference.hypernetwork import num_parameters

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """What one regime scores under one protocol.

    parameters   what the regime adds to the frozen base, or the base itself
    nll          float64 [texts], negative log-likelihood of each text's scored positions, in nats
    positions    int64 [texts], how many positions that were
    cluster_ids  int64 [texts]
    """

    regime: Literal["base", "lora", "chameleon"]
    protocol: Protocol
    parameters: int
    nll: npt.NDArray[np.float64]
    positions: npt.NDArray[np.int64]
    cluster_ids: npt.NDArray[np.int64]

    @property
    def num_positions(self) -> int:
        return int(self.positions.sum())

    @property
    def loss(self) -> float:
        """Nats per scored position."""
        return float(self.nll.sum() / self.positions.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def perplexity_by_cluster(self) -> dict[int, float]:
        of = {int(c): self.cluster_ids == c for c in np.unique(self.cluster_ids)}
        return {c: math.exp(self.nll[own].sum() / self.positions[own].sum()) for c, own in of.items()}


def evaluate(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    cache: Path,
    adapted: bool = True,
    protocol: Protocol | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Score held-out texts with a checkpoint, or with its frozen base (adapted=False).

    Cohorts are drawn per cluster, in the order of the texts, at most batch_size together: as in training.
    protocol  None takes the checkpoint's own
    cache     a directory for the hidden states

    Raises InputError when no text has two tokens.
    """
    config, trunk = checkpoint.config, checkpoint.trunk
    protocol = protocol or config.protocol
    ids = encode_texts(texts, trunk.tokenizer, protocol, config.max_length)
    states = cache_hidden_states(trunk, ids, protocol, config.max_length, cache)
    clusters = _clusters(checkpoint, states.embeddings)
    nll = np.zeros(len(ids))
    factors = checkpoint.factors if adapted else None
    for rows in cohorts([(clusters == k).nonzero().flatten() for k in clusters.unique()], batch_size):
        hidden, targets = states.batch(rows)
        losses = cohort_losses(factors, states.embeddings[rows], hidden, targets, trunk.head_weight, config.alpha)
        lengths = [int(states.offsets[row + 1] - states.offsets[row]) for row in rows]
        nll[rows] = [float(part.double().sum()) for part in losses.split(lengths)]
    parameters = num_parameters(checkpoint.factors) if adapted else trunk.num_parameters()
    regime = config.regime if adapted else "base"
    return Evaluation(regime, protocol, parameters, nll, np.diff(states.offsets), clusters.numpy())


def bootstrap_gain(ours: Evaluation, base: Evaluation, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the relative change of perplexity from base to ours, resampling whole texts in pairs.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: percentile interval.
    """
    random = np.random.default_rng(seed)
    changes = np.empty(BOOTSTRAP_SAMPLES)
    for i in range(BOOTSTRAP_SAMPLES):
        rows = random.integers(0, len(base.nll), len(base.nll))
        changes[i] = math.expm1((ours.nll[rows].sum() - base.nll[rows].sum()) / base.positions[rows].sum())
    low, high = np.quantile(changes, (0.025, 0.975))
    return float(low), float(high)


def cohort_rows(
    checkpoint: Checkpoint, texts: Sequence[str], batch_size: int = 32
) -> tuple[list[list[int]], list[list[int]]]:
    """The same cohorts for another engine: token ids of the texts, and the rows of each cohort."""
    config, trunk = checkpoint.config, checkpoint.trunk
    ids = encode_texts(texts, trunk.tokenizer, config.protocol, config.max_length)
    embeddings = embed_texts(ids, trunk.token_embedding, config.protocol, config.max_length, trunk.eos_token_id)
    clusters = _clusters(checkpoint, embeddings)
    return ids, list(cohorts([(clusters == k).nonzero().flatten() for k in clusters.unique()], batch_size))


def _clusters(checkpoint: Checkpoint, embeddings: torch.Tensor) -> torch.Tensor:
    """int64 [texts]; a checkpoint without centroids (PEFT, the authors' state dict) has one cluster of everything."""
    if not len(checkpoint.centroids):
        return torch.zeros(len(embeddings), dtype=torch.int64)
    return nearest_centroids(embeddings, checkpoint.centroids)


def bigram_perplexity(train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocab_size: int) -> float:
    """A baseline to beat: bigram counts interpolated with unigrams (Witten and Bell, 1991)."""
    unigrams = np.bincount(np.concatenate([np.asarray(ids) for ids in train]), minlength=vocab_size) + 1.0
    unigrams /= unigrams.sum()
    bigrams: npt.NDArray[np.float64] = np.zeros((vocab_size, vocab_size))
    for ids in train:
        np.add.at(bigrams, (ids[:-1], ids[1:]), 1.0)
    nll, count = 0.0, 0
    for ids in held_out:
        before, after = np.asarray(ids[:-1]), np.asarray(ids[1:])
        totals = bigrams[before].sum(1)
        # As much weight for the unseen as the context has different continuations.
        kinds = (bigrams[before] > 0).sum(1) + 1.0
        probability = (bigrams[before, after] + kinds * unigrams[after]) / (totals + kinds)
        nll, count = nll - float(np.log(probability).sum()), count + len(after)
    return math.exp(nll / count)
