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

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import ANY_VALUE, RewriteRule, RewriteRuleSet

from chameleon_deploy.export.attention import attention
from chameleon_deploy.export.graph import constant
from chameleon_deploy.export.trunk import table_names
from chameleon_deploy.reference.families.spec import DecoderSpec


def share_cache(decoder: ir.Model, model: DecoderSpec) -> int:
    """Rewrite a portable decoder in place. Returns the number of rewritten attentions: one per layer."""
    graph = decoder.graph
    lengths = ir.Value(name="seqlens_k", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT32))
    total = ir.Value(name="total_sequence_length", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
    lowest = np.full(model.num_attention_heads, np.finfo(np.float32).min, np.float32)
    sink = constant(graph, "shared_cache.head_sink", lowest)
    layers = {f"past_key_values.{i}.key": layer for i, layer in enumerate(model.layers)}
    common: dict[str, int | float] = {"num_heads": model.num_attention_heads, "kv_num_heads": model.num_key_value_heads}
    if model.scale != model.head_dim**-0.5:
        common["scale"] = model.scale
    if model.attention_cap is not None:
        common["softcap"] = model.attention_cap

    def shared(op: Any, past_key: Any, past_value: Any, **heads: Any) -> Any:
        layer = layers[past_key.name]
        # With a rotary embedding the operator rotates queries and keys itself, by the positions that follow from the
        # lengths.
        names = table_names(layer.rotary) if layer.rotary else None
        tables = [graph.initializers[name] for name in names] if names else [None, None]
        attributes = common | {"do_rotary": int(names is not None)}
        if layer.window is not None:
            attributes["local_window_size"] = layer.window
        qkv = heads["qkv"] if "qkv" in heads else heads["q"]
        return op.GroupQueryAttention(
            qkv, heads.get("k"), heads.get("v"), past_key, past_value, lengths, total, *tables, None, None, sink,
            **attributes, _domain="com.microsoft", _outputs=3,
        )  # fmt: skip

    def built(rotary: tuple[Any, Any] | None) -> Callable[..., Any]:
        """Return attention as attention.py builds it, with any bias and any rotary tables."""

        def joined(op: Any, qkv: Any, past_key: Any, past_value: Any) -> Any:
            return attention(op, model, [qkv], past_key, past_value, ANY_VALUE, rotary)

        def apart(op: Any, q: Any, k: Any, v: Any, past_key: Any, past_value: Any) -> Any:
            return attention(op, model, [q, k, v], past_key, past_value, ANY_VALUE, rotary)

        return apart if model.splits_heads else joined

    rules = [RewriteRule(built(rotary), shared) for rotary in (None, (ANY_VALUE, ANY_VALUE))]
    count = RewriteRuleSet(rules).apply_to_model(decoder)
    graph.inputs.extend([lengths, total])
    RemoveUnusedNodesPass()(decoder)
    graph.inputs.remove(next(value for value in graph.inputs if value.name == "attention_mask"))
    for value in [*graph.inputs, *graph.outputs]:
        if value.name and value.name.startswith(("past_key_values.", "present.")):
            value.shape = ir.Shape(["batch", model.num_key_value_heads, "capacity", model.head_dim])
    decoder.opset_imports["com.microsoft"] = 1
    return int(count)
