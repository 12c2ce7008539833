"""decoder.onnx: GPT-2 with a key-value cache and a head whose LoRA factors are inputs.

Written operator by operator from the weights rather than traced, so that the graph has only what it
needs, under names that other tools can bind to. Standard operators of opset 20 only: what NVIDIA's
parser and every ONNX runtime accept.

The update of rows with different factor sets takes two plain matrix products: the sets are stacked
into [clusters*rank, hidden] and [clusters*rank, vocab], and between the two each row keeps its own
set's columns and zeroes the others. No row copies lora_B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from chameleon_deploy.bundle import FloatArray, ModelSpec, StoredTensor
from chameleon_deploy.export.weights import WeightsFile, alias, stored_tensor

OPSET = 20
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def build_decoder(
    model: ModelSpec, weights: dict[str, FloatArray], epsilon: float, weights_file: WeightsFile
) -> tuple[ir.Model, StoredTensor]:
    """Write the weights and build the graph around them.

    model     dimensions
    weights   the Hugging Face state dict of a GPT-2 (`transformer.h.0.ln_1.weight`, ...), float32
    epsilon   of the layer norms
    Returns the graph and the place of the token embedding, which is also the head's weight.

    Inputs:
        input_ids, position_ids           int64 [batch, sequence]
        attention_mask                    int64 [batch, past + sequence], 1 = real token
        logits_positions                  int64 [batch, positions], which of the sequence positions get logits
        cluster_ids                       int64 [batch], the factor set of each row
        lora_A, lora_B                    float32 [clusters, rank, hidden], [clusters, rank, vocab]
        past_key_values.{i}.{key,value}   float32 [batch, heads, past, head_dim]
    Outputs:
        logits                            float32 [batch, positions, vocab]
        present.{i}.{key,value}           float32 [batch, heads, past + sequence, head_dim]
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="decoder")
    builder = GraphBuilder(graph)
    op = builder.op
    B, H, D = "batch", model.num_key_value_heads, model.head_dim

    def weight(name: str) -> ir.Value:
        return builder.initializer(weights_file.add(name, weights[name]), name)

    input_ids = builder.input("input_ids", INT64, [B, "sequence"])
    attention_mask = builder.input("attention_mask", INT64, [B, "total"])
    position_ids = builder.input("position_ids", INT64, [B, "sequence"])
    logits_positions = builder.input("logits_positions", INT64, [B, "positions"])
    cluster_ids = builder.input("cluster_ids", INT64, [B])
    lora_A = builder.input("lora_A", FLOAT, ["clusters", "rank", model.hidden_size])
    lora_B = builder.input("lora_B", FLOAT, ["clusters", "rank", model.vocab_size])
    past = [
        [builder.input(f"past_key_values.{i}.{kind}", FLOAT, [B, H, "past", D]) for kind in ("key", "value")]
        for i in range(model.num_layers)
    ]

    embedding = weights_file.add("transformer.wte.weight", weights["transformer.wte.weight"])
    # Two names for the same bytes: a runtime that repacks the head's matrix can then let go of the original,
    # while the lookup keeps only the pages of the tokens that occur.
    wte = builder.initializer(embedding, "transformer.wte.weight")
    head = builder.initializer(alias(embedding, "lm_head.weight"), "lm_head.weight")
    x = op.Add(op.Gather(wte, input_ids), op.Gather(weight("transformer.wpe.weight"), position_ids))
    bias = _attention_bias(op, past[0][0], input_ids, attention_mask)  # [batch, 1, sequence, total]
    present = []
    for i in range(model.num_layers):
        h = f"transformer.h.{i}"
        normed = op.LayerNormalization(x, weight(f"{h}.ln_1.weight"), weight(f"{h}.ln_1.bias"), epsilon=epsilon)
        qkv = _linear(op, normed, weight(f"{h}.attn.c_attn.weight"), weight(f"{h}.attn.c_attn.bias"))
        context, *key_value = _attention(op, qkv, past[i], bias, model)
        present.append(key_value)
        x = op.Add(x, _linear(op, context, weight(f"{h}.attn.c_proj.weight"), weight(f"{h}.attn.c_proj.bias")))
        normed = op.LayerNormalization(x, weight(f"{h}.ln_2.weight"), weight(f"{h}.ln_2.bias"), epsilon=epsilon)
        inner = _linear(op, normed, weight(f"{h}.mlp.c_fc.weight"), weight(f"{h}.mlp.c_fc.bias"))
        inner = op.Gelu(inner, approximate="tanh")
        x = op.Add(x, _linear(op, inner, weight(f"{h}.mlp.c_proj.weight"), weight(f"{h}.mlp.c_proj.bias")))
    x = op.LayerNormalization(x, weight("transformer.ln_f.weight"), weight("transformer.ln_f.bias"), epsilon=epsilon)

    builder.add_output(_head(op, x, head, logits_positions, cluster_ids, lora_A, lora_B, model), "logits")
    _declare(graph.outputs[-1], [B, "positions", model.vocab_size])
    for i, key_value in enumerate(present):
        for kind, value in zip(("key", "value"), key_value, strict=True):
            builder.add_output(value, f"present.{i}.{kind}")
            _declare(graph.outputs[-1], [B, H, "total", D])
    return ir.Model(graph, ir_version=10, producer_name="chameleon_deploy"), stored_tensor(embedding)


def _linear(op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value) -> Any:
    """GPT-2 stores its projections as [in, out] (Conv1D), which is what MatMul takes."""
    return op.Add(op.MatMul(x, weight), bias)


def _attention_bias(op: Any, past_key: ir.Value, input_ids: ir.Value, attention_mask: ir.Value) -> Any:
    """0 where a query may look, the lowest float elsewhere: causal, and real tokens only."""
    past = op.Squeeze(op.Shape(past_key, start=2, end=3))
    total = op.Add(past, op.Squeeze(op.Shape(input_ids, start=1, end=2)))
    queries = op.Unsqueeze(op.Range(past, total, _int(op, 1)), [1])  # [sequence, 1]
    keys = op.Unsqueeze(op.Range(_int(op, 0), total, _int(op, 1)), [0])  # [1, total]
    real = op.Cast(op.Unsqueeze(attention_mask, [1, 2]), to=ir.DataType.BOOL)  # [batch, 1, 1, total]
    allowed = op.And(op.LessOrEqual(keys, queries), real)
    return op.Where(allowed, _float(op, 0.0), _float(op, float(np.finfo(np.float32).min)))


def _attention(op: Any, qkv: ir.Value, past: list[ir.Value], bias: ir.Value, model: ModelSpec) -> tuple[Any, Any, Any]:
    """Multi-head attention over past and present.  qkv [batch, sequence, 3*hidden] -> context, key, value"""
    heads, dim = model.num_attention_heads, model.head_dim
    q, k, v = (
        op.Transpose(op.Reshape(part, [0, 0, heads, dim]), perm=[0, 2, 1, 3])
        for part in op.Split(qkv, axis=2, num_outputs=3, _outputs=3)
    )
    k = op.Concat(past[0], k, axis=2)  # [batch, heads, total, head_dim]
    v = op.Concat(past[1], v, axis=2)
    scores = op.MatMul(op.Mul(q, _float(op, dim**-0.5)), op.Transpose(k, perm=[0, 1, 3, 2]))
    context = op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), v)
    return op.Reshape(op.Transpose(context, perm=[0, 2, 1, 3]), [0, 0, heads * dim]), k, v


def _head(
    op: Any,
    hidden: ir.Value,
    weight: ir.Value,
    logits_positions: ir.Value,
    cluster_ids: ir.Value,
    lora_A: ir.Value,
    lora_B: ir.Value,
    model: ModelSpec,
) -> Any:
    """h W^T + (h A^T) B, each row with the factors of its own set.  -> [batch, positions, vocab]"""
    hidden_size, vocab_size = model.hidden_size, model.vocab_size
    kept = op.GatherND(hidden, op.Unsqueeze(logits_positions, [2]), batch_dims=1)  # [batch, positions, hidden]
    h = op.Reshape(kept, [-1, hidden_size])  # one row per position: [n, hidden]
    base = op.Gemm(h, weight, transB=1)
    products = op.Gemm(h, op.Reshape(lora_A, [-1, hidden_size]), transB=1)  # [n, clusters*rank]
    num_sets, rank = op.Squeeze(op.Shape(lora_A, start=0, end=1)), op.Shape(lora_A, start=1, end=2)
    sets = op.Unsqueeze(op.Range(_int(op, 0), num_sets, _int(op, 1)), [1])
    columns = op.Reshape(op.Expand(sets, op.Concat(op.Shape(lora_A, start=0, end=1), rank, axis=0)), [1, -1])
    rows = op.Expand(op.Unsqueeze(cluster_ids, [1]), op.Shape(logits_positions))
    own = op.Equal(op.Reshape(rows, [-1, 1]), columns)  # [n, clusters*rank]
    products = op.Where(own, products, _float(op, 0.0))
    logits = op.Gemm(products, op.Reshape(lora_B, [-1, vocab_size]), base)
    return op.Reshape(logits, op.Concat(op.Shape(logits_positions), _ints(op, [vocab_size]), axis=0))


def _int(op: Any, value: int) -> Any:
    return op.Constant(value_int=value)


def _ints(op: Any, values: list[int]) -> Any:
    return op.Constant(value_ints=values)


def _float(op: Any, value: float) -> Any:
    return op.Constant(value_float=value)


def _declare(value: ir.Value, shape: list[int | str]) -> None:
    value.shape, value.type = ir.Shape(shape), ir.TensorType(FLOAT)
