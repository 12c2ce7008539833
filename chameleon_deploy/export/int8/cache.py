"""An int8 key-value buffer: a quarter of the memory, and half the time of a step's attention.

Keys and values are stored with scales fixed at export (rotation.py), so that no row affects another. Larger values
saturate at 127. With a rotary embedding keys are centred and scaled here, after they have been turned
(docs/lab/int8.md).

past_key_values.*, present.*   int8 [batch, key-value heads, capacity, head_dim]

ONNX Runtime's GroupQueryAttention reads such a buffer, but processes several tokens at once three times as slowly as on
floats. So there are two branches. A step of one token uses that operator. A prompt rounds its keys and values to the
buffer's int8 values, attends to them as floats, and writes them: a text sees the same keys and values whether it is
prefilled whole, in pieces or token by token. Both branches write in place, since If passes the bound output memory to a
branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.export.graph import FLOAT, constant, integer, integers, subgraph, take_nodes
from chameleon_deploy.reference.families.spec import DecoderSpec

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class _Shared:
    """The values that all layers share.

    start, end  where new tokens start and end in the buffers, int64 [1]
    is_step     whether there is a single new token
    one         the scale of values that are divided by the buffer's scales already
    zero_point  int8 zero
    """

    position_ids: ir.Value
    start: ir.Value
    end: ir.Value
    is_step: ir.Value
    one: ir.Value
    zero_point: ir.Value


@dataclass(frozen=True)
class _Keys:
    """Parameters that round the keys of a layer whose matrices do not scale them.

    scales  of queries and keys [(heads + key-value heads) * head_dim]: the keys' steps, and their reciprocals
    centre  of the keys, in steps, [key-value heads * head_dim]
    """

    scales: ir.Value
    centre: ir.Value


def quantize_cache(decoder: ir.Model, model: DecoderSpec, keys: Sequence[tuple[FloatArray, FloatArray] | None]) -> int:
    """Rewrite a decoder with a shared float32 buffer in place. Returns how many attentions were rewritten.

    keys  of every layer, see `rotation.turned_keys`
    """
    graph = decoder.graph
    for value in [*graph.inputs, *graph.outputs]:
        if value.name and value.name.startswith(("past_key_values.", "present.")):
            value.type = ir.TensorType(ir.DataType.INT8)
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    shared = _shared(graph)
    for layer, attention in enumerate(attentions):
        name = f"int8_cache.{layer}"
        scaling = keys[layer]
        rounding = None if scaling is None else _keys(graph, name, model, *scaling)
        branches = {
            "then_branch": subgraph(graph, f"{name}.step", partial(_step, attention, model, shared, rounding)),
            "else_branch": subgraph(graph, f"{name}.prompt", partial(_prompt, attention, model, shared, rounding)),
        }
        either = ir.node("If", [shared.is_step], branches, num_outputs=3)
        ir.convenience.replace_nodes_and_values(
            graph, attention, [attention], [either], attention.outputs, either.outputs
        )
    return len(attentions)


def _keys(graph: ir.Graph, name: str, model: DecoderSpec, centre: FloatArray, steps: FloatArray) -> _Keys:
    of_queries = steps.reshape(model.num_key_value_heads, 1, model.head_dim)
    of_queries = of_queries.repeat(model.num_attention_heads // model.num_key_value_heads, 1)
    scales = np.concatenate([of_queries.ravel(), 1 / steps])
    return _Keys(constant(graph, f"{name}.scales", scales), constant(graph, f"{name}.centre", centre))


def _shared(graph: ir.Graph) -> _Shared:
    named = {value.name: value for value in graph.inputs}

    def where(op: Any) -> tuple[Any, Any, Any]:
        sequence = op.Shape(named["input_ids"], start=1, end=2)
        end = op.Reshape(op.Cast(named["total_sequence_length"], to=ir.DataType.INT64), integers(op, [1]))
        return op.Sub(end, sequence), end, op.Equal(op.Squeeze(sequence), integer(op, 1))

    ahead = subgraph(graph, "int8_cache", where)
    nodes, (start, end, is_step) = take_nodes(ahead)
    graph.insert_before(graph[0], nodes)
    one = constant(graph, "int8_cache.one", np.float32(1))
    zero_point = constant(graph, "int8_cache.zero_point", np.int8(0))
    return _Shared(named["position_ids"], start, end, is_step, one, zero_point)


def _step(attention: ir.Node, model: DecoderSpec, shared: _Shared, keys: _Keys | None, op: Any) -> Any:
    inputs = list(attention.inputs)
    attributes = {name: attribute.value for name, attribute in attention.attributes.items()}
    if keys is not None:
        inputs[:3] = _turned(attention, model, shared, keys, op)
        inputs[7:9] = None, None
        attributes.pop("do_rotary")
    quantised = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    return op.GroupQueryAttention(
        *inputs, shared.one, shared.one, **attributes, **quantised, _domain=MICROSOFT, _outputs=3
    )


def _turned(attention: ir.Node, model: DecoderSpec, shared: _Shared, keys: _Keys | None, op: Any) -> Any:
    """Return queries, keys and values, with a rotary embedding applied, and keys scaled and centred."""
    first, key, value, *_, cos, sin, _, _, _ = attention.inputs
    heads, key_heads, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    sizes = [heads * dim, key_heads * dim, key_heads * dim]
    if keys is None:
        return op.Split(first, integers(op, sizes), axis=2, _outputs=3)
    if key is None:
        qk, value = op.Split(first, integers(op, [sizes[0] + sizes[1], sizes[2]]), axis=2, _outputs=2)
    else:
        qk = op.Concat(first, key, axis=2)
    if cos is not None:
        partial = {"num_heads": heads + key_heads, "rotary_embedding_dim": model.rotary_dim}
        partial = partial if model.rotary_dim < dim else {}
        qk = op.RotaryEmbedding(qk, shared.position_ids, cos, sin, _domain=MICROSOFT, **partial)
    q, k = op.Split(op.Mul(qk, keys.scales), integers(op, sizes[:2]), axis=2, _outputs=2)
    return q, op.Sub(k, keys.centre), value


def _prompt(attention: ir.Node, model: DecoderSpec, shared: _Shared, keys: _Keys | None, op: Any) -> Any:
    _, _, _, *buffers, lengths, total_length, _, _, _, _, sink = attention.inputs
    key_heads, dim = model.num_key_value_heads, model.head_dim
    attributes = {name: attribute.value for name, attribute in attention.attributes.items() if name != "do_rotary"}
    q, k, v = _turned(attention, model, shared, keys, op)
    new = [op.QuantizeLinear(x, shared.one, shared.zero_point) for x in (k, v)]
    zero, tokens = integers(op, [0]), integers(op, [2])  # the axis of a buffer
    before = [op.Slice(x, zero, shared.start, tokens) for x in buffers]
    k, v, *past = (op.Cast(x, to=FLOAT) for x in (*new, *before))
    context = op.GroupQueryAttention(
        q, k, v, *past, lengths, total_length, None, None, None, None, sink, **attributes,
        _domain=MICROSOFT, _outputs=3,
    )[0]  # fmt: skip
    by_head = [op.Transpose(op.Reshape(x, integers(op, [0, 0, key_heads, dim])), perm=[0, 2, 1, 3]) for x in new]
    capacity = op.Shape(buffers[0], start=2, end=3)
    after = [op.Slice(x, shared.end, capacity, tokens) for x in buffers]
    return context, *(op.Concat(*parts, axis=2) for parts in zip(before, by_head, after, strict=True))
