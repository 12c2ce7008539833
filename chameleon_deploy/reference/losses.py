"""What a training minimises and an evaluation adds up: the cross-entropy of texts, given factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from chameleon_deploy.reference.clustering import embed_texts
from chameleon_deploy.reference.head_losses import HeadLosses
from chameleon_deploy.reference.hidden_states import cache_hidden_states
from chameleon_deploy.reference.hypernetwork import FactorModule
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.targets import in_head_alone
from chameleon_deploy.reference.trunk_losses import TrunkLosses


class Losses(Protocol):
    """The losses of a list of texts. Rows are indices of texts; all rows of a call have one factor set.

    A position counts if its protocol scores it, see hidden_states.py.

    """

    @property
    def embeddings(self) -> Tensor:
        """Return float32 [texts, conditioning_size]: of the texts, or the vectors that are given with them."""

    def __len__(self) -> int: ...

    def num_positions(self, rows: Sequence[int]) -> int: ...

    def cross_entropy(self, factors: FactorModule | None, conditioning: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the cross-entropy [positions] of rows with the factors of one conditioning vector
        [conditioning_size], the rows one after the other. factors None: the base model.
        """

    def backward(self, factors: FactorModule, conditioning: Tensor, rows: Sequence[int], positions: int) -> float:
        """Accumulate the gradient of the mean loss of a step of `positions`; return the summed loss of these rows."""


@dataclass(frozen=True)
class Objective:
    """Which updates are measured, and at which positions of a text.

    targets, alpha        of the updates
    protocol, max_length  of the texts, see hidden_states.py
    """

    targets: Sequence[str]
    alpha: float
    protocol: str
    max_length: int


def losses_of(
    trunk: Trunk,
    texts: Sequence[Sequence[int]],
    objective: Objective,
    directory: Path,
    report: Callable[[int], None] = lambda done: None,
    vectors: Tensor | None = None,
) -> Losses:
    """Return the losses of texts, which are lists of token ids.

    directory, report  of hidden states, see `cache_hidden_states`; without need where the trunk is updated
    vectors            [texts, conditioning_size], given with the texts and taken in place of their embeddings
    """
    protocol, max_length, alpha = objective.protocol, objective.max_length, objective.alpha
    if in_head_alone(objective.targets) and trunk.spec.logits_cap is None:  # whose gradient HeadLosses writes down
        states = cache_hidden_states(trunk, texts, protocol, max_length, directory, report)
        if vectors is not None:
            states = replace(states, embeddings=vectors)
        return HeadLosses(states, trunk.head_weight, alpha)
    if vectors is None:
        vectors = embed_texts(texts, trunk.token_embedding, protocol, max_length, trunk.eos_token_id)
    return TrunkLosses(trunk, texts, vectors, protocol, max_length, alpha)
