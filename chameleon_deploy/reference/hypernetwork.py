"""The two sources of head factors: a trained pair (LoRA) and a network that generates them.

Both return lora_A [rank, hidden] and lora_B [vocab, rank], and the head computes
`logits = h W^T + alpha * (h lora_A^T) lora_B^T`  (arXiv 2502.04315, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

DROPOUT = 0.5


class Hypernetwork(nn.Module):
    """A network from conditioning vector to factors: Linear ReLU Dropout Linear ReLU Dropout Linear.

    `layers` has the Linear modules only, so that parameter i of the checkpoint is `hypernetwork.{i}.weight` whatever
    the other modules are.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.hidden_size, self.vocab_size, self.rank = hidden_size, vocab_size, rank
        sizes = [hidden_size, *hidden_sizes, num_factors(hidden_size, vocab_size, rank)]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.dropout = nn.Dropout(DROPOUT)

    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """conditioning [clusters, hidden] -> lora_A [clusters, rank, hidden], lora_B [clusters, vocab, rank]."""
        x = conditioning
        *inner, last = self.layers
        for layer in inner:
            x = self.dropout(torch.relu(layer(x)))
        flat = last(x)  # [clusters, rank*hidden + vocab*rank]
        split = self.rank * self.hidden_size
        lora_A = flat[:, :split].unflatten(1, (self.rank, self.hidden_size))
        lora_B = flat[:, split:].unflatten(1, (self.vocab_size, self.rank))
        return lora_A, lora_B


class StaticLoRA(nn.Module):
    """One trained pair of factors for every text; the conditioning only determines the number of sets."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        # Both start small but not at zero: A = B = 0 would be a saddle point of the head alone.
        self.lora_A = nn.Parameter(torch.randn(rank, hidden_size) * 0.01)
        self.lora_B = nn.Parameter(torch.randn(vocab_size, rank) * 0.01)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """conditioning [clusters, hidden] -> lora_A [clusters, rank, hidden], lora_B [clusters, vocab, rank]."""
        n = len(conditioning)
        return self.lora_A.expand(n, -1, -1), self.lora_B.expand(n, -1, -1)


HeadFactors = Hypernetwork | StaticLoRA


def num_factors(hidden_size: int, vocab_size: int, rank: int) -> int:
    """Return how many numbers one factor set has: 204,100 for GPT-2 small at rank 4."""
    return rank * (hidden_size + vocab_size)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
