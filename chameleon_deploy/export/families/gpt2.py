"""The trunk of a GPT-2: layer norms, learned positions, an MLP of one inner layer."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.export.attention import attention, attention_bias
from chameleon_deploy.export.families.trunk import TrunkInputs, TrunkOutputs, at_positions
from chameleon_deploy.export.weights import GraphWeights
from chameleon_deploy.reference.model import Trunk

TOKEN_EMBEDDING = "transformer.wte.weight"  # noqa: S105, the name of a tensor
LAST_NORM = "transformer.ln_f"


def build_trunk(
    op: Any, weights: GraphWeights, token_embedding: ir.Value, inputs: TrunkInputs, model: ModelSpec, trunk: Trunk
) -> TrunkOutputs:
    """See `trunk.BuildTrunk`."""

    def norm(x: Any, name: str) -> Any:
        scale, bias = weights(f"{name}.weight"), weights(f"{name}.bias")
        return op.LayerNormalization(x, scale, bias, epsilon=trunk.config.layer_norm_epsilon)

    def linear(x: Any, name: str) -> Any:
        """GPT-2 stores its projections as [in, out] (Conv1D), which is what MatMul takes."""
        return op.Add(op.MatMul(x, weights(f"{name}.weight")), weights(f"{name}.bias"))

    positions = op.Gather(weights("transformer.wpe.weight"), inputs.position_ids)
    x = op.Add(op.Gather(token_embedding, inputs.input_ids), positions)
    bias = attention_bias(op, inputs.past[0][0], inputs.input_ids, inputs.attention_mask)
    present = []
    for i, past in enumerate(inputs.past):
        layer = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
        context, key, value = attention(op, model, qkv, *past, bias)
        present.append((key, value))
        if past is inputs.past[-1]:
            x, context = (at_positions(op, tensor, inputs.logits_positions) for tensor in (x, context))
        x = op.Add(x, linear(context, f"{layer}.attn.c_proj"))
        inner = linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        x = op.Add(x, linear(op.Gelu(inner, approximate="tanh"), f"{layer}.mlp.c_proj"))
    return norm(x, LAST_NORM), present
