"""Loss and perplexity of the three regimes under both protocols."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from chameleon_deploy.contract.bundle import Protocol
from chameleon_deploy.errors import InputError
from chameleon_deploy.evaluate.conditioning import Conditioning, cohort_mean, members_of
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.clustering import embed_texts, nearest_centroids
from chameleon_deploy.reference.corpus import encode_texts
from chameleon_deploy.reference.fit import cohorts
from chameleon_deploy.reference.hypernetwork import FactorModule, num_parameters
from chameleon_deploy.reference.losses import Losses, Objective, losses_of

BOOTSTRAP_SAMPLES = 2000
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one regime under one protocol.

    regime       "bundle" is the checkpoint's export, scored by the runtime
    parameters   number that the regime adds to the frozen base, or the base's own number
    nll          float64 [texts], negative log-likelihood of each text's scored positions, in nats
    positions    int64 [texts], number of scored positions
    cluster_ids  int64 [texts]
    """

    regime: Literal["base", "lora", "chameleon", "bundle"]
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
        """Return nats per scored position."""
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

    Cohorts are drawn per cluster, in the order of the texts, at most batch_size together, as in training.

    protocol  that of the loss; None takes the checkpoint's. Texts are always embedded by the checkpoint's protocol,
              since its hypernetwork was trained on those embeddings
    cache     a directory for the hidden states

    Raises InputError if no text has two tokens, or for a checkpoint that is conditioned on vectors of the caller.
    """
    if checkpoint.config.conditioning_size:
        raise InputError("texts are scored with their embeddings, and this checkpoint reads vectors of the caller")
    config, trunk = checkpoint.config, checkpoint.trunk
    protocol = protocol or config.protocol
    ids = encode_texts(texts, trunk.tokenizer, protocol, config.max_length)
    losses = losses_of(trunk, ids, Objective(config.targets, config.alpha, protocol, config.max_length), cache)
    embeddings = _embeddings(checkpoint, ids)
    clusters = _clusters(checkpoint, embeddings)
    conditioning = cohort_mean(embeddings, clusters, batch_size)
    factors = checkpoint.factors if adapted else None
    nll = score_texts(factors, losses, conditioning, batch_size)
    parameters = num_parameters(checkpoint.factors) if adapted else trunk.num_parameters()
    regime = config.regime if adapted else "base"
    return Evaluation(regime, protocol, parameters, nll, positions_of(losses), clusters.numpy())


def score_texts(
    factors: FactorModule | None, losses: Losses, conditioning: Conditioning, batch_size: int = 32
) -> FloatArray:
    """Return the negative log-likelihood of each text's scored positions, in nats, float64 [texts]; factors None: the
    base.
    """
    nll = np.zeros(len(losses))
    for vector, rows in conditioning.rows(batch_size):
        lengths = [losses.num_positions([row]) for row in rows]
        parts = losses.cross_entropy(factors, vector, rows).split(lengths)
        nll[rows] = [float(part.double().sum()) for part in parts]
    return nll


def positions_of(losses: Losses) -> npt.NDArray[np.int64]:
    """Return the number of scored positions of every text: int64 [texts]."""
    return np.array([losses.num_positions([row]) for row in range(len(losses))], np.int64)


def bootstrap_gain(ours: Evaluation, base: Evaluation, seed: int = 0) -> tuple[float, float]:
    """Return `bootstrap_change` from base to ours."""
    return bootstrap_change(ours.nll, base.nll, base.positions, seed)


def bootstrap_change(
    nll: FloatArray, base_nll: FloatArray, positions: npt.NDArray[np.int64], seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the relative change of perplexity, resampling whole texts in pairs.  All [texts].

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: percentile interval.
    """
    random, difference = np.random.default_rng(seed), nll - base_nll
    changes: list[FloatArray] = []
    for _ in range(0, BOOTSTRAP_SAMPLES, 100):  # a hundred samples at a time, to bound memory
        rows = random.integers(0, len(difference), (100, len(difference)))
        changes.append(np.expm1(difference[rows].sum(1) / positions[rows].sum(1)))
    low, high = np.quantile(np.concatenate(changes), (0.025, 0.975))
    return float(low), float(high)


def seed_interval(values: npt.ArrayLike) -> tuple[float, float] | None:
    """Return the 95 % Student interval of the mean over seeds [seeds]; None for a single seed."""
    from scipy import stats

    sample = np.asarray(values, np.float64)
    if len(sample) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))
    return float(sample.mean() - half), float(sample.mean() + half)


def cohort_rows(
    checkpoint: Checkpoint, texts: Sequence[str], batch_size: int = 32
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the cohorts of protocol `masked` for another engine: token ids of the texts, and the rows of each
    cohort.
    """
    ids = encode_texts(texts, checkpoint.trunk.tokenizer, "masked", checkpoint.config.max_length)
    clusters = _clusters(checkpoint, _embeddings(checkpoint, ids))
    return ids, list(cohorts(members_of(clusters, int(clusters.max()) + 1), batch_size))


def _embeddings(checkpoint: Checkpoint, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    config, trunk = checkpoint.config, checkpoint.trunk
    return embed_texts(ids, trunk.token_embedding, config.protocol, config.max_length, trunk.eos_token_id)


def _clusters(checkpoint: Checkpoint, embeddings: torch.Tensor) -> torch.Tensor:
    """Return int64 [texts]; a checkpoint without centroids (PEFT, the authors' state dict) has a single cluster."""
    if not len(checkpoint.centroids):
        return torch.zeros(len(embeddings), dtype=torch.int64)
    return nearest_centroids(embeddings, checkpoint.centroids)
