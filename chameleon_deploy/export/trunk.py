"""The graph from token ids to final hidden states, equal to `Trunk.hidden_states`: one builder for every family.

Projections of the same input are one matrix of the graph: one product instead of three, or two. Constant multipliers
and offsets of norms are in weights. What layers add is not multiplied by the residual multiplier: the residual stream
is divided by it instead, which changes no output of a norm whose epsilon is divided by its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.export.attention import attention, attention_bias, split_heads
from chameleon_deploy.export.graph import integers, real
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


def build_trunk(
    op: Any, weights: GraphWeights, token_embedding: ir.Value, inputs: TrunkInputs, trunk: Trunk
) -> TrunkOutputs:
    """Build the graph.

    After the last attention no position depends on another, so the rest of that layer is computed for
    `logits_positions` only.

    token_embedding  the table [vocab, hidden], written already because the head may share it
    trunk            the reference: its switches, and the sizes of its linear layers
    """
    spec, names = trunk.spec, trunk.spec.names
    sizes = {name: out for name, (_, out) in trunk.linear_layers().items()}
    epsilon = spec.epsilon / spec.residual_multiplier**2  # of norms that read the residual stream

    def norm(x: Any, name: str, epsilon: float = epsilon, factor: float = 1.0) -> Any:
        if spec.norm == "layer":
            scale, bias = weights(f"{name}.weight"), weights(f"{name}.bias")
            return op.LayerNormalization(x, scale, bias, epsilon=epsilon)
        # x / sqrt(mean(x^2) + epsilon) * weight, in the operators that ONNX Runtime fuses into one
        mean = op.ReduceMean(op.Pow(x, real(op, 2.0)), integers(op, [-1]))
        root = op.Sqrt(op.Add(mean, real(op, epsilon)))
        y = op.Mul(op.Div(x, root), weights(f"{name}.weight", spec.norm_offset, factor))
        return op.Add(y, weights(f"{name}.bias")) if f"{name}.bias" in weights else y

    def product(x: Any, matrix: str, targets: Sequence[str]) -> Any:
        """Return the product with the targets' weights, side by side."""
        parts = [f"{target}.weight" for target in targets]
        y = op.MatMul(x, weights.side_by_side(matrix, parts, spec.transposed))
        biases = [f"{target}.bias" for target in targets]
        if biases[0] in weights:
            y = op.Add(y, weights.side_by_side(f"{matrix.removesuffix('.weight')}.bias", biases))
        return y

    def updated(y: Any, x: Any, targets: Sequence[str], at: ir.Value) -> Any:
        return inputs.updates.add(y, x, at, [(target, sizes[target]) for target in targets])

    def linear(x: Any, matrix: str, targets: Sequence[str], at: ir.Value) -> Any:
        return updated(product(x, matrix, targets), x, targets, at)

    def inner(x: Any, matrix: str, targets: Sequence[str], at: ir.Value) -> Any:
        """Return the inputs of the MLP's output projection."""
        y = product(x, matrix, targets)
        if len(targets) == 1:
            y = updated(y, x, targets, at)
        if not spec.gated:
            return activation(y)
        half = sum(sizes[target] for target in targets) // 2
        halves = op.Split(y, [half, half], axis=2, _outputs=2)
        if len(targets) == 2:
            halves = [updated(y, x, [target], at) for y, target in zip(halves, targets, strict=True)]
        gate, up = halves
        return op.Mul(activation(gate), up)  # https://arxiv.org/abs/2002.05202

    def activation(x: Any) -> Any:
        if spec.activation == "silu":
            return op.Mul(x, op.Sigmoid(x))
        return op.Gelu(x, approximate="tanh") if spec.activation == "gelu_tanh" else op.Gelu(x)

    def heads(qkv: Any, i: int) -> Any:
        """Return queries, keys and values as attention takes them."""
        if not spec.splits_heads:
            return (qkv,)
        q, k, v = split_heads(op, spec, qkv)
        if spec.query_key_norm is None:
            return q, k, v
        q, k = (
            norm_of_heads(x, spec.module(i, name), count)
            for x, name, count in (
                (q, names.query_norm, spec.num_attention_heads),
                (k, names.key_norm, spec.num_key_value_heads),
            )
        )
        return q, k, v

    def norm_of_heads(x: Any, name: str, count: int) -> Any:
        if spec.query_key_norm == "all":
            return norm(x, name, spec.epsilon)
        by_head = op.Reshape(x, [0, 0, count, spec.head_dim])
        return op.Reshape(norm(by_head, name, spec.epsilon), [0, 0, count * spec.head_dim])

    def if_any(name: str | None, x: Any, i: int, epsilon: float = epsilon) -> Any:
        return x if name is None else norm(x, spec.module(i, name), epsilon)

    positions = None
    if names.position_embedding:
        positions = op.Gather(weights(f"{names.position_embedding}.weight"), inputs.position_ids)
    x = op.Gather(token_embedding, inputs.input_ids)
    if spec.embedding_multiplier != spec.residual_multiplier:
        x = op.Mul(x, real(op, spec.embedding_multiplier / spec.residual_multiplier))
    if positions is not None:
        x = op.Add(x, positions)
    biases = {
        window: attention_bias(op, inputs.past[0][0], inputs.attention_mask, inputs.position_ids, window)
        for window in dict.fromkeys(layer.window for layer in spec.layers)
    }
    turns = {
        name: [
            op.Unsqueeze(op.Gather(weights.add(*table), inputs.position_ids), [1])
            for table in zip(table_names(name), rotary_tables(trunk, name), strict=True)
        ]
        for name in dict.fromkeys(layer.rotary for layer in spec.layers)
        if name is not None
    }
    present = []
    at = inputs.input_ids
    for i, (layer, past) in enumerate(zip(spec.layers, inputs.past, strict=True)):
        matrices, targets = spec.matrices(i), spec.targets(i)
        qkv = linear(if_any(names.attention_norm, x, i), matrices.qkv, targets.qkv, at)
        rotary = turns[layer.rotary] if layer.rotary else None
        context, key, value = attention(op, spec, heads(qkv, i), *past, biases[layer.window], rotary)
        present.append((key, value))
        if past is inputs.past[-1]:
            at = inputs.logits_positions
            x, context = (_at_positions(op, tensor, at) for tensor in (x, context))
        read = x
        attended = linear(context, matrices.o, targets.o, at)
        x = op.Add(x, if_any(names.attention_post_norm, attended, i, spec.epsilon))
        read = if_any(names.mlp_norm, read if spec.parallel else x, i)
        projected = linear(inner(read, matrices.up, targets.up, at), matrices.down, targets.down, at)
        x = op.Add(x, if_any(names.mlp_post_norm, projected, i, spec.epsilon))
    return norm(x, names.last_norm, factor=spec.logits_multiplier), present


def table_names(rotary: str) -> tuple[str, str]:
    """Return the graph's names of the cosines and sines of a rotary embedding, see `LayerSpec`."""
    return f"{rotary}.cos", f"{rotary}.sin"


def rotary_tables(trunk: Trunk, rotary: str) -> tuple[FloatArray, FloatArray]:
    """Return cosines and sines float32 [max_positions, rotary_dim / 2] as the reference computes them, with any scaling
    of the model applied.
    """
    module, _, kind = rotary.partition(".")
    positions = torch.arange(trunk.max_positions)[None]
    with torch.no_grad():
        cos, sin = getattr(trunk.causal_lm.base_model, module)(torch.empty(1), positions, *filter(None, [kind]))
    half = cos.shape[-1] // 2  # the second half repeats the first
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()


def rotary_angles(trunk: Trunk, rotary: str) -> FloatArray:
    """Return by how much every position turns each pair of a key's coordinates, float32 [max_positions, rotary_dim
    / 2], counting whole turns.
    """
    cos, sin = rotary_tables(trunk, rotary)
    return np.unwrap(np.arctan2(sin, cos), axis=0).astype(np.float32)  # no frequency is above 1 per position


def _at_positions(op: Any, x: Any, positions: ir.Value) -> Any:
    """Select positions: [batch, sequence, channels], [batch, positions] -> [batch, positions, channels]."""
    return op.GatherND(x, op.Unsqueeze(positions, [2]), batch_dims=1)
