"""Losses of updates of any layers: texts are read by the frozen trunk with the factors of their batch.

Gradients flow through the trunk to the factors. A batch is read a few texts at a time, and each block of a long one
keeps only its input and is computed again on the way back, so that memory does not grow with the number of layers'
activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from chameleon_deploy.reference.adapters import adapted
from chameleon_deploy.reference.head_losses import CHUNK_POSITIONS
from chameleon_deploy.reference.hidden_states import scored_states, targets_of
from chameleon_deploy.reference.hypernetwork import FactorModule, factor_set
from chameleon_deploy.reference.model import Trunk

TEXTS_AT_ONCE = 8
# Activations are kept, not computed again, up to this size, counted as inputs and outputs of linear layers.
KEPT_BYTES = 1 << 30
# PyTorch's fused attention on the CPU is slower than plain products below some length: on SmolLM2 a step of texts of 48
# tokens takes 2.1 s with it and 1.65 s without, of 96 3.6 and 3.3 s, of 256 8.7 and 10.7 s.
FUSED_ATTENTION_LENGTH = 128


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
        self._bytes_per_position = 4 * sum(map(sum, trunk.linear_layers().values()))

    def __len__(self) -> int:
        return len(self._texts)

    def num_positions(self, rows: Sequence[int]) -> int:
        return len(rows) if self._protocol == "paper" else sum(len(self._texts[row]) - 1 for row in rows)

    @torch.no_grad()
    def cross_entropy(self, factors: FactorModule | None, conditioning: Tensor, rows: Sequence[int]) -> Tensor:
        """See `Losses`."""
        one_set = {} if factors is None else factor_set(factors(conditioning[None]), 0, self._alpha)
        with adapted(self._trunk, one_set):
            found: list[Tensor] = []
            for part in self._parts(rows):
                with self._attention(part):
                    found += self._of_chunks(*self._read(part))
            return torch.cat(found)

    def backward(self, factors: FactorModule, conditioning: Tensor, rows: Sequence[int], positions: int) -> float:
        """See `Losses`."""
        generated = factor_set(factors(conditioning[None]), 0, self._alpha)
        leaves = {name: value.detach().requires_grad_() for name, value in generated.items()}
        total = 0.0
        with adapted(self._trunk, leaves):
            for part in self._parts(rows):
                with self._attention(part), self._memory(part):
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

    def _width(self, rows: Sequence[int]) -> int:
        """Return the tokens of a padded row."""
        return self._max_length if self._protocol == "paper" else max(len(self._texts[row]) for row in rows)

    def _attention(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Choose the implementation of attention."""
        return nullcontext() if self._width(rows) >= FUSED_ATTENTION_LENGTH else sdpa_kernel(SDPBackend.MATH)

    def _memory(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Choose whether activations are kept or computed again."""
        kept = len(rows) * self._width(rows) * self._bytes_per_position <= KEPT_BYTES
        return nullcontext() if kept else _checkpointed(self._trunk)

    def _read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return hidden states [positions, hidden] and targets int64 [positions] of rows, concatenated."""
        texts = [self._texts[row] for row in rows]
        eos = self._trunk.eos_token_id
        targets = [targets_of(ids, self._protocol, self._max_length, eos) for ids in texts]
        states = scored_states(self._trunk, texts, self._protocol, self._max_length)
        return torch.cat(states), torch.from_numpy(np.concatenate(targets))

    def _of_chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for h, t in zip(hidden.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True):
            yield nn.functional.cross_entropy(self._trunk.logits(h), t, reduction="none")


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
