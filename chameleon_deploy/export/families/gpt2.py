"""GPT-2: layer norms, learned positions, an MLP with one inner layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from chameleon_deploy.contract.bundle import ModelSpec
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
from chameleon_deploy.export.weights import GraphWeights
from chameleon_deploy.reference.model import Trunk

POSITION_EMBEDDING, LAST_NORM = "transformer.wpe.weight", "transformer.ln_f"


def matrix_names(i: int) -> MatrixNames:
    """See `Family`."""
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return MatrixNames(*(f"transformer.h.{i}.{part}.weight" for part in parts))


def layer_targets(i: int) -> LayerTargets:
    """See `Family`."""
    return LayerTargets(*((name.removesuffix(".weight"),) for name in matrix_names(i)))


def build_trunk(
    op: Any, weights: GraphWeights, token_embedding: ir.Value, inputs: TrunkInputs, model: ModelSpec, trunk: Trunk
) -> TrunkOutputs:
    """See `BuildTrunk`."""

    def norm(x: Any, name: str) -> Any:
        scale, bias = weights(f"{name}.weight"), weights(f"{name}.bias")
        return op.LayerNormalization(x, scale, bias, epsilon=trunk.config.layer_norm_epsilon)

    def linear(x: Any, matrix: str, at: ir.Value) -> Any:
        """GPT-2 stores its projections as [in, out] (Conv1D), which is what MatMul takes."""
        name = matrix.removesuffix(".weight")
        y = op.Add(op.MatMul(x, weights(matrix)), weights(f"{name}.bias"))
        return inputs.updates.add(y, x, at, [(name, trunk.causal_lm.get_submodule(name).weight.shape[1])])

    positions = op.Gather(weights(POSITION_EMBEDDING), inputs.position_ids)
    x = op.Add(op.Gather(token_embedding, inputs.input_ids), positions)
    bias = attention_bias(op, inputs.past[0][0], inputs.input_ids, inputs.attention_mask)
    present = []
    at = inputs.input_ids
    for i, past in enumerate(inputs.past):
        layer, names = f"transformer.h.{i}", matrix_names(i)
        qkv = linear(norm(x, f"{layer}.ln_1"), names.qkv, at)
        context, key, value = attention(op, model, qkv, *past, bias)
        present.append((key, value))
        if past is inputs.past[-1]:
            at = inputs.logits_positions
            x, context = (at_positions(op, tensor, at) for tensor in (x, context))
        x = op.Add(x, linear(context, names.o, at))
        inner = linear(norm(x, f"{layer}.ln_2"), names.up, at)
        x = op.Add(x, linear(op.Gelu(inner, approximate="tanh"), names.down, at))
    return norm(x, LAST_NORM), present


def layers(trunk: Trunk) -> Iterator[Layer]:
    """See `Family`."""
    for i, block in enumerate(trunk.causal_lm.base_model.h):
        attn, mlp = block.attn, block.mlp
        weights, biases = attn.c_attn.weight.chunk(3, 1), attn.c_attn.bias.chunk(3)
        q, k, v = (Linear(*part) for part in zip(weights, biases, strict=True))
        o, up, down = (Linear(linear.weight, linear.bias) for linear in (attn.c_proj, mlp.c_fc, mlp.c_proj))
        readers = (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
        yield Layer(block.ln_1, block.ln_2, q, k, v, o, [up], down, matrix_names(i), readers)


GPT2 = Family(
    name="gpt2",
    token_embedding="transformer.wte.weight",  # noqa: S106, the name of a tensor
    last_norm=LAST_NORM,
    position_embedding=POSITION_EMBEDDING,
    rotary_tables=None,
    rotary_angles=None,
    build_trunk=build_trunk,
    layers=layers,
    matrix_names=matrix_names,
    layer_targets=layer_targets,
    add_biases=lambda trunk: None,  # GPT-2 has them
)
