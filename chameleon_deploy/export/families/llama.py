"""The trunk of a Llama: RMS norms, rotary embedding, grouped-query attention, a gated MLP.

Projections that read the same input stand side by side in one matrix: one product instead of three, or two.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from chameleon_deploy.bundle import FloatArray, ModelSpec
from chameleon_deploy.export.attention import attention, attention_bias
from chameleon_deploy.export.families.trunk import TrunkInputs, TrunkOutputs, at_positions
from chameleon_deploy.export.graph import integers, real
from chameleon_deploy.export.weights import GraphWeights
from chameleon_deploy.reference.model import Trunk

TOKEN_EMBEDDING = "model.embed_tokens.weight"  # noqa: S105, the name of a tensor
LAST_NORM = "model.norm"
ROTARY_TABLES = ("rotary_emb.cos", "rotary_emb.sin")


def build_trunk(
    op: Any, weights: GraphWeights, token_embedding: ir.Value, inputs: TrunkInputs, model: ModelSpec, trunk: Trunk
) -> TrunkOutputs:
    """See `trunk.BuildTrunk`."""
    epsilon, inner_size = trunk.config.rms_norm_eps, trunk.config.intermediate_size

    def norm(x: Any, name: str) -> Any:
        """x / sqrt(mean(x^2) + epsilon) * weight, in the operators that ONNX Runtime fuses into one."""
        mean = op.ReduceMean(op.Pow(x, real(op, 2.0)), integers(op, [-1]))
        return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, real(op, epsilon)))), weights(f"{name}.weight"))

    x = op.Gather(token_embedding, inputs.input_ids)
    bias = attention_bias(op, inputs.past[0][0], inputs.input_ids, inputs.attention_mask)
    tables = zip(ROTARY_TABLES, rotary_tables(trunk), strict=True)
    cos, sin = (op.Unsqueeze(op.Gather(weights.add(*table), inputs.position_ids), [1]) for table in tables)
    present = []
    for i, past in enumerate(inputs.past):
        layer = f"model.layers.{i}"
        normed = norm(x, f"{layer}.input_layernorm")
        parts = [f"{layer}.self_attn.{part}_proj.weight" for part in "qkv"]
        qkv = op.MatMul(normed, weights.side_by_side(f"{layer}.self_attn.qkv_proj.weight", parts))
        context, key, value = attention(op, model, qkv, *past, bias, (cos, sin))
        present.append((key, value))
        if past is inputs.past[-1]:
            x, context = (at_positions(op, tensor, inputs.logits_positions) for tensor in (x, context))
        x = op.Add(x, op.MatMul(context, weights.side_by_side(f"{layer}.self_attn.o_proj.weight")))
        normed = norm(x, f"{layer}.post_attention_layernorm")
        parts = [f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        gate_up = op.MatMul(normed, weights.side_by_side(f"{layer}.mlp.gate_up_proj.weight", parts))
        gate, up = op.Split(gate_up, [inner_size, inner_size], axis=2, _outputs=2)
        inner = op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)  # SwiGLU (https://arxiv.org/abs/2002.05202)
        x = op.Add(x, op.MatMul(inner, weights.side_by_side(f"{layer}.mlp.down_proj.weight")))
    return norm(x, LAST_NORM), present


def rotary_tables(trunk: Trunk) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines float32 [max_positions, head_dim / 2], as the reference computes them: whatever kind of
    scaling the model has is in them."""
    positions = torch.arange(trunk.max_positions)[None]
    with torch.no_grad():
        cos, sin = trunk.causal_lm.base_model.rotary_emb(torch.empty(1), positions)
    half = cos.shape[-1] // 2  # the second half repeats the first
    return cos[0, :, :half].contiguous().numpy(), sin[0, :, :half].contiguous().numpy()
