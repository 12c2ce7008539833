"""Attention over a shared past/present buffer: ONNX Runtime's GroupQueryAttention.

The portable graph concatenates past and present, which copies the whole cache at every step. Here each row's keys and
values are written into a buffer that is both input and output, at the row's own length. Operator:
com.microsoft.GroupQueryAttention (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).

    attention_mask                       removed
    seqlens_k              int32 [batch] real tokens of each row after this call, minus one
    total_sequence_length  int32 []      the largest of them, plus one
    past_key_values.*, present.*         [batch, heads, capacity, head_dim], bound to the same memory

A no-op attention sink (head_sink, added to the sum of a softmax) changes nothing but the kernel: with one ONNX Runtime
multiplies whole matrices instead of tiles, which takes half the time at every length of prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import RewriteRule

from chameleon_deploy.contract.bundle import ModelSpec
from chameleon_deploy.export.attention import attention
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.graph import constant


def share_cache(decoder: ir.Model, model: ModelSpec) -> int:
    """Rewrite a portable decoder in place. Returns the number of rewritten attentions: one per layer."""
    graph = decoder.graph
    lengths = ir.Value(name="seqlens_k", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT32))
    total = ir.Value(name="total_sequence_length", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
    # With a rotary embedding the operator rotates queries and keys itself, by the positions that follow from the
    # lengths.
    names = family_of(model.architecture).rotary_tables
    tables = [graph.initializers[name] for name in names] if names else [None, None]
    rotary = names is not None

    lowest = np.full(model.num_attention_heads, np.finfo(np.float32).min, np.float32)
    sink = constant(graph, "shared_cache.head_sink", lowest)

    def portable(op: Any, qkv: Any, past_key: Any, past_value: Any, bias: Any) -> Any:
        return attention(op, model, qkv, past_key, past_value, bias)

    def portable_rotary(op: Any, qkv: Any, past_key: Any, past_value: Any, bias: Any, cos: Any, sin: Any) -> Any:
        return attention(op, model, qkv, past_key, past_value, bias, (cos, sin))

    def shared(op: Any, qkv: Any, past_key: Any, past_value: Any, **_: Any) -> Any:
        return op.GroupQueryAttention(
            qkv, None, None, past_key, past_value, lengths, total, *tables, None, None, sink,
            num_heads=model.num_attention_heads, kv_num_heads=model.num_key_value_heads, do_rotary=int(rotary),
            _domain="com.microsoft", _outputs=3,
        )  # fmt: skip

    count = RewriteRule(portable_rotary if rotary else portable, shared).apply_to_model(decoder)
    graph.inputs.extend([lengths, total])
    RemoveUnusedNodesPass()(decoder)
    graph.inputs.remove(next(value for value in graph.inputs if value.name == "attention_mask"))
    for value in [*graph.inputs, *graph.outputs]:
        if value.name and value.name.startswith(("past_key_values.", "present.")):
            value.shape = ir.Shape(["batch", model.num_key_value_heads, "capacity", model.head_dim])
    decoder.opset_imports["com.microsoft"] = 1
    return int(count)
