"""The interface of a family of base models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import onnx_ir as ir
from torch import Tensor, nn

from chameleon_deploy.contract.bundle import FloatArray, ModelSpec
from chameleon_deploy.export.low_rank import Updates
from chameleon_deploy.export.weights import GraphWeights
from chameleon_deploy.reference.model import Trunk

# Final hidden states [batch, positions, hidden], and key and value of every layer.
TrunkOutputs = tuple[Any, Sequence[tuple[Any, Any]]]


@dataclass(frozen=True)
class TrunkInputs:
    """input_ids, position_ids  int64 [batch, sequence]
    attention_mask           int64 [batch, past + sequence]
    logits_positions         int64 [batch, positions], which of the sequence get final hidden states
    past                     key and value of every layer, float32 [batch, key-value heads, past, head_dim]
    updates                  of the linear layers
    """

    input_ids: ir.Value
    position_ids: ir.Value
    attention_mask: ir.Value
    logits_positions: ir.Value
    past: Sequence[tuple[ir.Value, ir.Value]]
    updates: Updates


class BuildTrunk(Protocol):
    """Build the graph from token ids to final hidden states (after the last norm), equal to `Trunk.hidden_states`.

    After the last attention no position depends on another, so the rest of that layer is computed for
    `logits_positions` only.

    token_embedding  the table [vocab, hidden], written already because the head may share it
    trunk            the reference: its configuration
    """

    def __call__(
        self,
        op: Any,
        weights: GraphWeights,
        token_embedding: ir.Value,
        inputs: TrunkInputs,
        model: ModelSpec,
        trunk: Trunk,
    ) -> TrunkOutputs: ...


class MatrixNames(NamedTuple):
    """The graph's names of a layer's four matrices. qkv and up follow a norm, down an activation function."""

    qkv: str
    o: str
    up: str
    down: str


class LayerTargets(NamedTuple):
    """The linear layers behind each of those matrices, by their PEFT names, in the order of the matrix's channels."""

    qkv: tuple[str, ...]
    o: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]


@dataclass(frozen=True)
class Linear:
    """A linear layer of the reference.

    matrix  [in, out], a view of a parameter: writing to it changes the model
    bias    [out], also a view, or None
    """

    matrix: Tensor
    bias: Tensor | None


def bias_of(norm: nn.Module) -> Tensor | None:
    """Return the bias of a norm; None if it has none, as in a Llama."""
    bias: Tensor | None = getattr(norm, "bias", None)
    return bias


@dataclass(frozen=True)
class Layer:
    """A layer of the reference: x += o(attention(q, k, v of norm_1(x))); x += down(activation(ups of norm_2(x))).

    names    graph names of its matrices
    readers  for each matrix, a module whose input is the matrix's input
    """

    norm_1: Any
    norm_2: Any
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    ups: list[Linear]
    down: Linear
    names: MatrixNames
    readers: tuple[nn.Module, nn.Module, nn.Module, nn.Module]


@dataclass(frozen=True)
class Family:
    """The facts and functions that export needs of one family.

    name                ModelSpec.architecture
    token_embedding     name of the table, in the reference and in the graph
    last_norm           name of the module whose outputs are the final hidden states
    position_embedding  name of the table of learned positions, which is added to the residual stream; None without
    rotary_tables       names in the graph of the cosines and sines [max_positions, head_dim / 2]; None without
    rotary_angles       returns by how much every position turns each pair of a key's coordinates, [max_positions,
                        head_dim / 2], counting whole turns; None without
    build_trunk         builds the graph
    layers              the layers of a reference, first to last
    matrix_names        names in the graph of the matrices of layer i
    layer_targets       PEFT names of the linear layers of layer i
    add_biases          gives a reference biases of zeros, where it has none, in the norms whose outputs are worth
                        centring in int8, in the linear layers after them and in those of attention; `build_trunk` then
                        builds them
    """

    name: str
    token_embedding: str
    last_norm: str
    position_embedding: str | None
    rotary_tables: tuple[str, str] | None
    rotary_angles: Callable[[Trunk], FloatArray] | None
    build_trunk: BuildTrunk
    layers: Callable[[Trunk], Iterator[Layer]]
    matrix_names: Callable[[int], MatrixNames]
    layer_targets: Callable[[int], LayerTargets]
    add_biases: Callable[[Trunk], None]

    def last_norm_of(self, trunk: Trunk) -> nn.Module:
        """Return the module whose outputs are the final hidden states."""
        norm: nn.Module = trunk.causal_lm.get_submodule(self.last_norm)
        return norm


def at_positions(op: Any, x: Any, positions: ir.Value) -> Any:
    """Select positions: [batch, sequence, channels], [batch, positions] -> [batch, positions, channels]."""
    return op.GatherND(x, op.Unsqueeze(positions, [2]), batch_dims=1)
