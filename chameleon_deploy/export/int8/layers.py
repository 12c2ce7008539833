"""A trunk's layers with their parameters taken apart, which int8 rotates and scales in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chameleon_deploy.reference.families.spec import DecoderSpec, LayerTargets, MatrixNames
from chameleon_deploy.reference.model import Trunk

Columns = slice | Tensor  # of a linear layer's outputs


@dataclass
class Linear:
    """Some outputs of a linear layer of the reference, as a layer of their own. Setting its parameters changes the
    reference.
    """

    layer: Any
    columns: Columns
    transposed: bool

    @property
    def matrix(self) -> Tensor:
        """Return the weights, [in, out]."""
        return self._weight[:, self.columns]

    @matrix.setter
    def matrix(self, value: Tensor) -> None:
        self._weight[:, self.columns] = value

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, [out]."""
        bias: Tensor | None = self.layer.bias
        return None if bias is None else bias[self.columns]

    @bias.setter
    def bias(self, value: Tensor) -> None:
        self.layer.bias[self.columns] = value

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.layer.weight
        return weight if self.transposed else weight.T


@dataclass
class Norm:
    """A norm of the reference. Setting its parameters changes the reference."""

    module: nn.Module
    offset: float

    @property
    def weight(self) -> Tensor:
        """Return by what normalised channels are multiplied, [hidden]."""
        return self._parameter + self.offset

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._parameter.copy_(value - self.offset)

    @property
    def bias(self) -> Tensor | None:
        """Return the bias, [hidden]; None if it has none, as an RMS norm."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    @property
    def _parameter(self) -> Tensor:
        parameter: Tensor = getattr(self.module, "weight")  # noqa: B009  (of any type of module)
        return parameter


@dataclass(frozen=True)
class Layer:
    """A layer of the reference: x += o(attention(q, k, v of norm_1(x))); x += down(activation(ups of norm_2(x))).

    norm_1, norm_2  None where it reads x itself
    post_norms      of what attention and MLP add; None where it is added as it is
    names           the graph's names of its matrices
    targets         the linear layers behind them
    readers         for each matrix, a module whose input is the matrix's input
    """

    norm_1: Norm | None
    norm_2: Norm | None
    post_norms: tuple[nn.Module | None, nn.Module | None]
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    ups: list[Linear]
    down: Linear
    names: MatrixNames
    targets: LayerTargets
    readers: tuple[nn.Module, nn.Module, nn.Module, nn.Module]

    @property
    def after_norms(self) -> list[tuple[Norm | None, str, list[Linear]]]:
        """Return the two norms, each with the matrix after it, and the linear layers of that."""
        return [(self.norm_1, self.names.qkv, [self.q, self.k, self.v]), (self.norm_2, self.names.up, self.ups)]


def layers_of(trunk: Trunk) -> Iterator[Layer]:
    """Return the layers of a reference, first to last."""
    spec, names, model = trunk.spec, trunk.spec.names, trunk.causal_lm

    def module(i: int, name: str | None) -> Any:
        return None if name is None else model.get_submodule(spec.module(i, name))

    def norm(i: int, name: str | None) -> Norm | None:
        return None if name is None else Norm(module(i, name), spec.norm_offset)

    for i in range(spec.num_layers):
        targets = spec.targets(i)
        q, k, v = _linears(model, targets.qkv, qkv_columns(spec), spec.transposed)
        halves = _halves(model.get_submodule(targets.up[0])) if spec.gated else [slice(None)]
        ups = _linears(model, targets.up, halves, spec.transposed)
        (o,), (down,) = (_linears(model, part, [slice(None)], spec.transposed) for part in (targets.o, targets.down))
        read_qkv, read_o, read_up, read_down = (model.get_submodule(part[0]) for part in targets)
        yield Layer(
            norm(i, names.attention_norm),
            norm(i, names.mlp_norm),
            (module(i, names.attention_post_norm), module(i, names.mlp_post_norm)),
            q,
            k,
            v,
            o,
            ups,
            down,
            spec.matrices(i),
            targets,
            (read_qkv, read_o, read_up, read_down),
        )


def qkv_columns(spec: DecoderSpec) -> list[Columns]:
    """Return where a single projection to queries, keys and values has each of the three."""
    heads, key_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    if spec.interleaved:
        return list(torch.arange(3 * heads * dim).view(heads, 3, dim).transpose(0, 1).flatten(1))
    ends = [heads * dim, (heads + key_heads) * dim, (heads + 2 * key_heads) * dim]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _halves(layer: Any) -> list[Columns]:
    half = layer.out_features // 2
    return [slice(half), slice(half, None)]


def _linears(model: Any, names: Sequence[str], columns: Sequence[Columns], transposed: bool) -> list[Linear]:
    """Return linear layers by their names, or if there is only one name the parts of that one."""
    if len(names) == 1:
        return [Linear(model.get_submodule(names[0]), part, transposed) for part in columns]
    return [Linear(model.get_submodule(name), slice(None), transposed) for name in names]


def add_biases(trunk: Trunk) -> None:
    """Give a reference biases of zeros, where it has none: in the RMS norms whose outputs are worth centring in int8,
    in the linear layers after them, and in those of attention. The graph builder then builds them.
    """
    for layer in layers_of(trunk):
        linears = [layer.q, layer.k, layer.v, layer.o]
        if layer.norm_2 is not None:
            linears += layer.ups
            if layer.norm_2.bias is None:
                norm = layer.norm_2.module
                norm.register_parameter("bias", nn.Parameter(torch.zeros_like(layer.norm_2.weight)))
                norm.register_forward_hook(lambda module, inputs, output: output + module.bias)
        for linear in linears:
            if linear.layer.bias is None:
                linear.layer.bias = nn.Parameter(torch.zeros(linear.layer.out_features))
