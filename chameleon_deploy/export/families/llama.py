"""Llama: RMS norms, rotary embedding, grouped-query attention, a gated MLP.

Projections of the same input are concatenated to one matrix of the graph: one product instead of three, or two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from chameleon_deploy.contract.bundle import FloatArray, ModelSpec
from chameleon_deploy.export.attention import attention, attention_bias
from chameleon_deploy.export.families.family import (
    Family,
    Layer,
    LayerTargets,
    Linear,
    MatrixNames,
    TrunkInputs,
    TrunkOutputs,
    at_positions,
)
from chameleon_deploy.export.graph import integers, real
from chameleon_deploy.export.weights import GraphWeights
from chameleon_deploy.reference.model import Trunk

LAST_NORM, ROTARY_TABLES = "model.norm", ("rotary_emb.cos", "rotary_emb.sin")


def matrix_names(i: int) -> MatrixNames:
    """See `Family`."""
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return MatrixNames(*(f"model.layers.{i}.{part}.weight" for part in parts))


def layer_targets(i: int) -> LayerTargets:
    """See `Family`."""
    attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
    return LayerTargets(
        (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
        (f"{attn}.o_proj",),
        (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        (f"{mlp}.down_proj",),
    )


def build_trunk(
    op: Any, weights: GraphWeights, token_embedding: ir.Value, inputs: TrunkInputs, model: ModelSpec, trunk: Trunk
) -> TrunkOutputs:
    """See `BuildTrunk`."""
    epsilon, inner_size = trunk.config.rms_norm_eps, trunk.config.intermediate_size

    def norm(x: Any, name: str) -> Any:
        """Return x / sqrt(mean(x^2) + epsilon) * weight, in the operators that ONNX Runtime fuses into one."""
        mean = op.ReduceMean(op.Pow(x, real(op, 2.0)), integers(op, [-1]))
        y = op.Mul(op.Div(x, op.Sqrt(op.Add(mean, real(op, epsilon)))), weights(f"{name}.weight"))
        return op.Add(y, weights(f"{name}.bias")) if f"{name}.bias" in weights else y

    x = op.Gather(token_embedding, inputs.input_ids)
    bias = attention_bias(op, inputs.past[0][0], inputs.input_ids, inputs.attention_mask)
    tables = zip(ROTARY_TABLES, rotary_tables(trunk), strict=True)
    cos, sin = (op.Unsqueeze(op.Gather(weights.add(*table), inputs.position_ids), [1]) for table in tables)
    heads = (model.num_attention_heads, model.num_key_value_heads, model.num_key_value_heads)
    qkv_sizes = [model.head_dim * n for n in heads]

    def product(x: Any, matrix: str, targets: Sequence[str]) -> Any:
        """Return the product with the targets' weights, side by side."""
        parts = [f"{target}.weight" for target in targets]
        y = op.MatMul(x, weights.side_by_side(matrix, parts))
        biases = [f"{target}.bias" for target in targets]
        if biases[0] in weights:
            y = op.Add(y, weights.side_by_side(f"{matrix.removesuffix('.weight')}.bias", biases))
        return y

    def linear(x: Any, matrix: str, targets: Sequence[str], sizes: Sequence[int], at: ir.Value) -> Any:
        """Return the same with the targets' updates."""
        return inputs.updates.add(product(x, matrix, targets), x, at, list(zip(targets, sizes, strict=True)))

    present = []
    at = inputs.input_ids
    for i, past in enumerate(inputs.past):
        layer, names, targets = f"model.layers.{i}", matrix_names(i), layer_targets(i)
        qkv = linear(norm(x, f"{layer}.input_layernorm"), names.qkv, targets.qkv, qkv_sizes, at)
        context, key, value = attention(op, model, qkv, *past, bias, (cos, sin))
        present.append((key, value))
        if past is inputs.past[-1]:
            at = inputs.logits_positions
            x, context = (at_positions(op, tensor, at) for tensor in (x, context))
        x = op.Add(x, linear(context, names.o, targets.o, [model.hidden_size], at))
        read = norm(x, f"{layer}.post_attention_layernorm")
        halves = op.Split(product(read, names.up, targets.up), [inner_size, inner_size], axis=2, _outputs=2)
        gate, up = (
            inputs.updates.add(y, read, at, [(name, inner_size)]) for y, name in zip(halves, targets.up, strict=True)
        )
        inner = op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)  # SwiGLU (https://arxiv.org/abs/2002.05202)
        x = op.Add(x, linear(inner, names.down, targets.down, [model.hidden_size], at))
    return norm(x, LAST_NORM), present


def layers(trunk: Trunk) -> Iterator[Layer]:
    """See `Family`."""
    for i, block in enumerate(trunk.causal_lm.base_model.layers):
        attn, mlp = block.self_attn, block.mlp
        q, k, v, o = (_linear(attn, part) for part in "qkvo")
        gate, up, down = (_linear(mlp, part) for part in ("gate", "up", "down"))
        norms = block.input_layernorm, block.post_attention_layernorm
        readers = (attn.q_proj, attn.o_proj, mlp.gate_proj, mlp.down_proj)
        yield Layer(*norms, q, k, v, o, [gate, up], down, matrix_names(i), readers)


def _linear(of: Any, part: str) -> Linear:
    """PyTorch's linear layers store their weights as [out, in]."""
    linear = getattr(of, f"{part}_proj")
    return Linear(linear.weight.T, linear.bias)


def add_biases(trunk: Trunk) -> None:
    """See `Family`."""
    for block in trunk.causal_lm.base_model.layers:
        norm, attention = block.post_attention_layernorm, block.self_attn
        norm.register_parameter("bias", torch.nn.Parameter(torch.zeros_like(norm.weight)))
        norm.register_forward_hook(lambda module, inputs, output: output + module.bias)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, block.mlp.gate_proj,
                       block.mlp.up_proj):  # fmt: skip
            if linear.bias is None:
                linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))


def rotary_tables(trunk: Trunk) -> tuple[FloatArray, FloatArray]:
    """Return cosines and sines float32 [max_positions, head_dim / 2] as the reference computes them, with any
    scaling of the model applied.
    """
    positions = torch.arange(trunk.max_positions)[None]
    with torch.no_grad():
        cos, sin = trunk.causal_lm.base_model.rotary_emb(torch.empty(1), positions)
    half = cos.shape[-1] // 2  # the second half repeats the first
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()


def rotary_angles(trunk: Trunk) -> FloatArray:
    """See `Family`."""
    cos, sin = rotary_tables(trunk)
    return np.unwrap(np.arctan2(sin, cos), axis=0).astype(np.float32)  # no frequency is above 1 per position


LLAMA = Family(
    name="llama",
    token_embedding="model.embed_tokens.weight",  # noqa: S106, the name of a tensor
    last_norm=LAST_NORM,
    position_embedding=None,
    rotary_tables=ROTARY_TABLES,
    rotary_angles=rotary_angles,
    build_trunk=build_trunk,
    layers=layers,
    matrix_names=matrix_names,
    layer_targets=layer_targets,
    add_biases=add_biases,
)
