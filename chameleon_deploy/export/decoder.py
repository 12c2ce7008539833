"""decoder.onnx: a language model with a key-value cache and low-rank updates whose factors are inputs.

It is written operator by operator from the weights rather than traced, so that the graph has only what it needs, under
names that other tools can bind to. It uses only standard operators of opset 20, which NVIDIA's parser and every ONNX
runtime accept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import onnx_ir as ir
from onnxscript import GraphBuilder

from chameleon_deploy.contract.bundle import (
    HEAD,
    LM_HEAD,
    FloatArray,
    StoredTensor,
    TargetSpec,
    factor_names,
    int8_names,
)
from chameleon_deploy.export.graph import FLOAT, INT64, OPSET, declare
from chameleon_deploy.export.hadamard import block_of
from chameleon_deploy.export.head import build_head
from chameleon_deploy.export.low_rank import SHIFT, Updates
from chameleon_deploy.export.trunk import TrunkInputs, build_trunk
from chameleon_deploy.export.weights import GraphWeights, WeightsFile, alias, stored_tensor
from chameleon_deploy.reference.families.spec import DecoderSpec
from chameleon_deploy.reference.model import Trunk


def build_decoder(
    trunk: Trunk,
    targets: Sequence[TargetSpec],
    weights_file: WeightsFile,
    shifts: Mapping[str, FloatArray] = MappingProxyType({}),
) -> ir.Model:
    """Write the weights and build the graph around them.

    targets  the linear layers that get low-rank updates
    shifts   see `Updates`

    Inputs:
        input_ids, position_ids           int64 [batch, sequence]
        attention_mask                    int64 [batch, past + sequence], 1 = real token
        logits_positions                  int64 [batch, positions], which of the sequence positions get logits
        factor_ids                        int64 [batch], the factor set of each row
        {target}.lora_A                   float32 [factor_sets, rank, in_features]
        {target}.lora_B                   float32 [factor_sets, rank, out_features]
        past_key_values.{i}.{key,value}   float32 [batch, key-value heads, past, head_dim]
    Outputs:
        logits                            float32 [batch, positions, vocab]
        present.{i}.{key,value}           float32 [batch, key-value heads, past + sequence, head_dim]
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="decoder")
    builder = GraphBuilder(graph)
    op = builder.op
    spec = trunk.spec
    B, H, D = "batch", spec.num_key_value_heads, spec.head_dim

    input_ids = builder.input("input_ids", INT64, [B, "sequence"])
    attention_mask = builder.input("attention_mask", INT64, [B, "total"])
    position_ids = builder.input("position_ids", INT64, [B, "sequence"])
    logits_positions = builder.input("logits_positions", INT64, [B, "positions"])
    factor_ids = builder.input("factor_ids", INT64, [B])
    factors = {target.name: _factor_inputs(builder, target) for target in targets}

    def cached(i: int, kind: str) -> ir.Value:
        return builder.input(f"past_key_values.{i}.{kind}", FLOAT, [B, H, "past", D])

    past = [(cached(i, "key"), cached(i, "value")) for i in range(spec.num_layers)]

    weights = GraphWeights(builder, weights_file, trunk.causal_lm.state_dict())
    token_embedding = weights(f"{spec.names.embedding}.weight")
    updates = Updates(
        op,
        factor_ids,
        targets,
        factors,
        {name: weights.add(f"{name}{SHIFT}", shift) for name, shift in shifts.items()},
    )
    hidden, present = build_trunk(
        op,
        weights,
        token_embedding,
        TrunkInputs(input_ids, position_ids, attention_mask, logits_positions, past, updates),
        trunk,
    )
    head = _tied_head(builder, token_embedding) if trunk.is_tied else weights(HEAD)
    builder.add_output(build_head(op, hidden, head, factor_ids, factors.get(LM_HEAD), spec), "logits")
    declare(graph.outputs[-1], [B, "positions", spec.vocab_size])
    for i, key_value in enumerate(present):
        for kind, value in zip(("key", "value"), key_value, strict=True):
            builder.add_output(value, f"present.{i}.{kind}")
            declare(graph.outputs[-1], [B, H, "total", D])
    return ir.Model(graph, ir_version=10, producer_name="chameleon_deploy")


def _factor_inputs(builder: Any, target: TargetSpec) -> tuple[ir.Value, ir.Value]:
    lora_A, lora_B = (
        builder.input(name, FLOAT, ["factor_sets", "rank", width])
        for name, width in zip(factor_names(target.name), (target.in_features, target.out_features), strict=True)
    )
    return lora_A, lora_B


def token_embedding_of(decoder: ir.Model, spec: DecoderSpec) -> StoredTensor:
    """Return where a decoder's token embedding is stored."""
    tensors, name = decoder.graph.initializers, f"{spec.names.embedding}.weight"
    if name in tensors:
        return stored_tensor(tensors[name])
    rows, scales, channels = (stored_tensor(tensors[part]) for part in (*int8_names(name), channel_scales(name)))
    return msgspec.structs.replace(
        rows,
        row_scales_offset=scales.offset,
        channel_scales_offset=channels.offset,
        rotation=block_of(spec.hidden_size),
    )


def channel_scales(name: str) -> str:
    """Return the graph's name of the scales of an int8 table's channels."""
    return f"{name}.channel_scale"


def _tied_head(builder: Any, token_embedding: ir.Value) -> ir.Value:
    """Give the same bytes a second name.

    A runtime that repacks the head's matrix can then free the original, while the lookup keeps only the pages of the
    tokens that occur.
    """
    value: ir.Value = builder.initializer(alias(token_embedding, HEAD), HEAD)
    return value
