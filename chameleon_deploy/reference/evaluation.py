"""Loss and perplexity of the three regimes under both protocols, on cached hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from chameleon_deploy.reference.checkpoint import Checkpoint, Protocol
from chameleon_deploy.reference.clustering import nearest_centroids
from chameleon_deploy.reference.corpus import encode_texts
from chameleon_deploy.reference.head import cohorts, validation_loss
from chameleon_deploy.reference.hidden_states import cache_hidden_states
from chameleon_deploy.reference.hypernetwork import num_parameters


@dataclass(frozen=True)
class Evaluation:
    """parameters: what the regime adds to the frozen base, or the base itself; loss in nats per scored position."""

    regime: Literal["base", "lora", "chameleon"]
    protocol: Protocol
    parameters: int
    loss: float
    num_positions: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def evaluate(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    cache: Path,
    adapted: bool = True,
    protocol: Protocol | None = None,
    batch_size: int = 32,
) -> Evaluation:
    """Held-out loss of a checkpoint, or of its frozen base (adapted=False).

    Cohorts are drawn per cluster, in the order of the texts, at most batch_size together: as in training.
    protocol  None takes the checkpoint's own
    cache     a directory for the hidden states

    Raises InputError when no text has two tokens.
    """
    config, trunk = checkpoint.config, checkpoint.trunk
    protocol = protocol or config.protocol
    ids = encode_texts(texts, trunk.tokenizer, protocol, config.max_length)
    states = cache_hidden_states(trunk, ids, protocol, config.max_length, cache)
    loss = validation_loss(
        checkpoint.factors if adapted else None,
        trunk.head_weight,
        config.alpha,
        states,
        checkpoint.centroids,
        batch_size,
    )
    parameters = num_parameters(checkpoint.factors) if adapted else trunk.num_parameters()
    return Evaluation(config.regime if adapted else "base", protocol, parameters, loss, len(states.targets))


def cohort_rows(
    checkpoint: Checkpoint, texts: Sequence[str], batch_size: int = 32
) -> tuple[list[list[int]], list[list[int]]]:
    """The same cohorts for another engine: token ids of the texts, and the rows of each cohort."""
    from chameleon_deploy.reference.clustering import embed_texts

    config, trunk = checkpoint.config, checkpoint.trunk
    ids = encode_texts(texts, trunk.tokenizer, config.protocol, config.max_length)
    embeddings = embed_texts(ids, trunk.token_embedding, config.protocol, config.max_length, trunk.eos_token_id)
    assigned = nearest_centroids(embeddings, checkpoint.centroids)
    clusters = [(assigned == k).nonzero().flatten() for k in range(len(checkpoint.centroids))]
    return ids, list(cohorts(clusters, batch_size))


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
