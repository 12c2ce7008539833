"""The sources of factors: trained ones (LoRA), and two networks that generate them from a conditioning vector.

All return "<target>.lora_A" [sets, rank, in_features] and "<target>.lora_B" [sets, out_features, rank] of every target,
whose layer then computes `y + alpha * (x lora_A^T) lora_B^T`  (arXiv 2502.04315, section 3).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from chameleon_deploy.contract.bundle import TargetSpec, factor_names

DROPOUT = 0.5
FactorTensors = dict[str, Tensor]


class FactorModule(nn.Module, ABC):
    """The interface of a source of factors."""

    def __init__(self, targets: Sequence[TargetSpec], rank: int) -> None:
        super().__init__()
        self.targets, self.rank = tuple(targets), rank

    @abstractmethod
    def forward(self, conditioning: Tensor) -> FactorTensors:
        """Return the factors of every target for conditioning [sets, conditioning_size]."""

    def stored_name(self, parameter: str) -> str:
        """Return a parameter's name in the checkpoint."""
        return f"hypernetwork.{parameter}"

    @abstractmethod
    def begin_at_base(self, conditioning: Tensor) -> None:
        """Set lora_B of every target to zero, as LoRA begins (arXiv 2106.09685): random updates of many layers would
        begin with a broken model.

        A network's first layer is scaled so that its outputs have mean 0 and standard deviation 1 over
        `conditioning` [vectors, conditioning_size] (arXiv 1511.06856): cluster means differ by little, and a network
        that hardly sees the difference learns one update for all.
        """


class Hypernetwork(FactorModule):
    """The paper's network: Linear ReLU Dropout Linear ReLU Dropout Linear, which gives the factors of all targets.

    `layers` has the Linear modules only, so that parameter i of the checkpoint is `hypernetwork.{i}.weight` whatever
    the other modules are.
    """

    def __init__(
        self, conditioning_size: int, targets: Sequence[TargetSpec], rank: int, hidden_sizes: Sequence[int]
    ) -> None:
        super().__init__(targets, rank)
        sizes = [conditioning_size, *hidden_sizes, num_factors(targets, rank)]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.dropout = nn.Dropout(DROPOUT)

    def linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, conditioning: Tensor) -> FactorTensors:
        """See `FactorModule`."""
        x = conditioning
        *inner, last = self.layers
        for layer in inner:
            x = self.dropout(torch.relu(layer(x)))
        return split_factors(last(x), self.targets, self.rank)

    def stored_name(self, parameter: str) -> str:
        """Return hypernetwork.{i}.weight or .bias."""
        return parameter.replace("layers.", "hypernetwork.", 1)

    @torch.no_grad()
    def begin_at_base(self, conditioning: Tensor) -> None:
        """See `FactorModule`."""
        first, *_, last = self.linears()
        _standardize(first, conditioning)
        _zero_B(last, self.targets, self.rank)

    @torch.no_grad()
    def begin_with(self, lora: FactorTensors) -> None:
        """Give every conditioning the same factors, of one set [1, ...]: those of a trained LoRA."""
        last = self.linears()[-1]
        last.weight.zero_()
        names = [name for target in self.targets for name in factor_names(target.name)]
        last.bias.copy_(torch.cat([lora[name].flatten() for name in names]))


class SharedHypernetwork(FactorModule):
    """One network for every layer, which is told the layer and the module by learned embeddings, as in Text-to-LoRA
    (arXiv 2506.06105): parameters hardly grow with the number of layers.

    The embeddings are added to the first Linear's output, and the last Linear is one of each kind of module, such as
    `self_attn.q_proj`.
    """

    def __init__(
        self, conditioning_size: int, targets: Sequence[TargetSpec], rank: int, hidden_sizes: Sequence[int]
    ) -> None:
        super().__init__(targets, rank)
        places = [place_of(target.name) for target in targets]
        layers, modules = ([*dict.fromkeys(column)] for column in zip(*places, strict=True))
        # Of each target: the rows of the two embeddings.
        self.places = [(layers.index(layer), modules.index(module)) for layer, module in places]
        sizes = {module: num_factors([target], rank) for (_, module), target in zip(places, targets, strict=True)}
        self.conditioning = nn.Linear(conditioning_size, hidden_sizes[0])
        self.layer = nn.Embedding(len(layers), hidden_sizes[0])
        self.module = nn.Embedding(len(modules), hidden_sizes[0])
        self.inner = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(hidden_sizes))
        self.heads = nn.ModuleList(nn.Linear(hidden_sizes[-1], sizes[module]) for module in modules)
        self.dropout = nn.Dropout(DROPOUT)

    def inner_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.inner if isinstance(layer, nn.Linear)]

    def last_layers(self) -> list[nn.Linear]:
        """Return the last layer of each kind of module, by the second of `places`."""
        return [head for head in self.heads if isinstance(head, nn.Linear)]

    def place_embeddings(self) -> Tensor:
        """Return the sum of each target's layer and module embedding [targets, hidden_sizes[0]]."""
        layers, modules = zip(*self.places, strict=True)
        placed: Tensor = self.layer.weight[list(layers)] + self.module.weight[list(modules)]
        return placed

    def forward(self, conditioning: Tensor) -> FactorTensors:
        """See `FactorModule`."""
        x = self.dropout(torch.relu(self.conditioning(conditioning)[:, None] + self.place_embeddings()))
        for layer in self.inner:
            x = self.dropout(torch.relu(layer(x)))  # [sets, targets, hidden]
        factors: FactorTensors = {}
        for target, own, (_, module) in zip(self.targets, x.unbind(1), self.places, strict=True):
            factors |= split_factors(self.heads[module](own), [target], self.rank)
        return factors

    @torch.no_grad()
    def begin_at_base(self, conditioning: Tensor) -> None:
        """See `FactorModule`."""
        _standardize(self.conditioning, conditioning)
        for target, (_, module) in zip(self.targets, self.places, strict=True):
            _zero_B(self.last_layers()[module], [target], self.rank)


class StaticLoRA(FactorModule):
    """Trained factors for every text; the conditioning only determines the number of sets."""

    def __init__(self, targets: Sequence[TargetSpec], rank: int) -> None:
        super().__init__(targets, rank)
        # Both start small but not at zero: A = B = 0 would be a saddle point of the head alone.
        pairs = [
            (torch.randn(rank, target.in_features) * 0.01, torch.randn(target.out_features, rank) * 0.01)
            for target in targets
        ]
        self.lora_A = nn.ParameterList(A for A, _ in pairs)
        self.lora_B = nn.ParameterList(B for _, B in pairs)

    def forward(self, conditioning: Tensor) -> FactorTensors:
        """See `FactorModule`."""
        n = len(conditioning)
        return {self.stored_name(name): value.expand(n, -1, -1) for name, value in self.named_parameters()}

    def stored_name(self, parameter: str) -> str:
        """Return <target>.lora_A or .lora_B."""
        kind, _, index = parameter.partition(".")
        return f"{self.targets[int(index)].name}.{kind}"

    @torch.no_grad()
    def begin_at_base(self, conditioning: Tensor) -> None:
        """See `FactorModule`."""
        for lora_B in self.lora_B:
            lora_B.zero_()


def split_factors(flat: Tensor, targets: Sequence[TargetSpec], rank: int) -> FactorTensors:
    """Return the factors in vectors [sets, num_factors]: of one target after the other A, then B; views of them."""
    shapes: dict[str, tuple[int, int]] = {}
    for target in targets:
        name_A, name_B = factor_names(target.name)
        shapes |= {name_A: (rank, target.in_features), name_B: (target.out_features, rank)}
    parts = flat.split([a * b for a, b in shapes.values()], 1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def factor_stacks(factors: FactorTensors, alpha: float) -> FactorTensors:
    """Return sets as the runtime has them: lora_A [sets, rank, in_features], and lora_B [sets, rank, out_features] with
    alpha multiplied in.
    """
    return {name: alpha * stack.mT if name.endswith(".lora_B") else stack for name, stack in factors.items()}


def factor_set(factors: FactorTensors, index: int, alpha: float) -> FactorTensors:
    """Return one set as the runtime and adapters have it, see `factor_stacks`."""
    return factor_stacks({name: stack[index] for name, stack in factors.items()}, alpha)


def place_of(target: str) -> tuple[int | None, str]:
    """Return the layer's number and the module's name within it, such as 3 and mlp.up_proj.

    A target outside the layers has no number.
    """
    found = re.search(r"\.(\d+)\.(.+)", target)
    return (int(found[1]), found[2]) if found else (None, target)


def num_factors(targets: Sequence[TargetSpec], rank: int) -> int:
    """Return how many numbers one factor set has: 204,100 for GPT-2 small's head at rank 4."""
    return rank * sum(target.in_features + target.out_features for target in targets)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _standardize(first: nn.Linear, vectors: Tensor) -> None:
    """Scale a layer so that its outputs have mean 0 and standard deviation 1 over vectors [vectors, in_features].

    A single vector has no deviation and leaves the layer as it is.
    """
    if len(vectors) < 2:
        return
    outputs = first(vectors)
    deviation = outputs.std(0, correction=0)
    first.weight /= deviation[:, None]
    first.bias.copy_((first.bias - outputs.mean(0)) / deviation)


def _zero_B(last: nn.Linear, targets: Sequence[TargetSpec], rank: int) -> None:
    """Set to zero what a last layer gives as lora_B."""
    for parameter in (last.weight.T, last.bias[None]):
        for name, values in split_factors(parameter, targets, rank).items():
            if name.endswith(".lora_B"):
                values.zero_()
