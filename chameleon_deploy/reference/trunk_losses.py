"""Losses of updates of any layers: texts are read by the frozen trunk with the factors of their batch.

Gradients flow through the trunk to the factors. Each block keeps only its input and is computed again on the way back,
and a batch is read a few texts at a time, so that memory does not grow with the number of layers' activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chameleon_deploy.reference.adapters import adapted
from chameleon_deploy.reference.head_losses import CHUNK_POSITIONS
from chameleon_deploy.reference.hidden_states import scored_states, targets_of
from chameleon_deploy.reference.hypernetwork import FactorModule, factor_set
from chameleon_deploy.reference.model import Trunk

TEXTS_AT_ONCE = 8


class TrunkLosses:
    """See `Losses`."""

    def __init__(
        self,
        trunk: Trunk,
        texts: Sequence[Sequence[int]],
        embeddings: Tensor,
        protocol: str,
        max_length: int,
        alpha: float,
    ) -> None:
        self.embeddings = embeddings
        self._trunk, self._texts, self._alpha = trunk, texts, alpha
        self._protocol, self._max_length = protocol, max_length

    def __len__(self) -> int:
        return len(self._texts)

    def num_positions(self, rows: Sequence[int]) -> int:
        return len(rows) if self._protocol == "paper" else sum(len(self._texts[row]) - 1 for row in rows)

    @torch.no_grad()
    def cross_entropy(self, factors: FactorModule | None, conditioning: Tensor, rows: Sequence[int]) -> Tensor:
        """See `Losses`."""
        one_set = {} if factors is None else factor_set(factors(conditioning[None]), 0, self._alpha)
        with adapted(self._trunk, one_set):
            return torch.cat([loss for part in self._parts(rows) for loss in self._of_chunks(*self._read(part))])

    def backward(self, factors: FactorModule, conditioning: Tensor, rows: Sequence[int], positions: int) -> float:
        """See `Losses`."""
        generated = factor_set(factors(conditioning[None]), 0, self._alpha)
        leaves = {name: value.detach().requires_grad_() for name, value in generated.items()}
        total = 0.0
        with adapted(self._trunk, leaves), _checkpointed(self._trunk):
            for part in self._parts(rows):
                hidden, targets = self._read(part)
                states = hidden.detach().requires_grad_()
                for loss in self._of_chunks(states, targets):  # one chunk's logits at a time
                    (loss.sum() / positions).backward()
                    total += float(loss.detach().double().sum())
                if hidden.requires_grad:  # not where the head alone is updated
                    hidden.backward(states.grad)
        torch.autograd.backward(list(generated.values()), [leaf.grad for leaf in leaves.values()])
        return total

    def _parts(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(rows), TEXTS_AT_ONCE):
            yield rows[start : start + TEXTS_AT_ONCE]

    def _read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return hidden states [positions, hidden] and targets int64 [positions] of rows, concatenated."""
        texts = [self._texts[row] for row in rows]
        eos = self._trunk.eos_token_id
        targets = [targets_of(ids, self._protocol, self._max_length, eos) for ids in texts]
        states = scored_states(self._trunk, texts, self._protocol, self._max_length)
        return torch.cat(states), torch.from_numpy(np.concatenate(targets))

    def _of_chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
        head = self._trunk.causal_lm.get_output_embeddings()
        for h, t in zip(hidden.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True):
            yield nn.functional.cross_entropy(head(h), t, reduction="none")


@contextmanager
def _checkpointed(trunk: Trunk) -> Iterator[None]:
    """Let the trunk's blocks keep their inputs alone and compute the rest again for the gradient.

    The Hugging Face option for it needs training mode, which would also turn on the trunk's dropout.
    """
    (blocks,) = (module for module in trunk.causal_lm.base_model.children() if isinstance(module, nn.ModuleList))
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
