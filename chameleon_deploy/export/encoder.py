"""encoder.onnx: the sentence encoder, token ids [batch, sequence] -> embeddings [batch, size].

All texts of a call have equal lengths, so that nothing is padded or masked: a runtime calls it with one text, whose
embedding then depends on no other.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from chameleon_deploy.export.graph import INT64, OPSET, declare, integer, integers, real
from chameleon_deploy.export.weights import GraphWeights, WeightsFile
from chameleon_deploy.reference.sentence_encoder import SentenceEncoder


def build_encoder(encoder: SentenceEncoder, weights_file: WeightsFile) -> ir.Model:
    """Build the graph, with pooling and normalisation."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="encoder")
    builder = GraphBuilder(graph)
    op, config, family = builder.op, encoder.model.config, encoder.family
    weights = GraphWeights(builder, weights_file, encoder.model.state_dict())
    heads, size = config.num_attention_heads, encoder.size
    width = size // heads
    input_ids = builder.input("input_ids", INT64, ["batch", "sequence"])
    length = op.Squeeze(op.Shape(input_ids, start=1, end=2))
    positions = op.Range(integer(op, 0), length, integer(op, 1))

    def norm(x: Any, name: str) -> Any:
        scale, bias = weights(f"{name}.weight"), weights(f"{name}.bias")
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=config.layer_norm_eps)

    def linear(x: Any, name: str, parts: tuple[str, ...]) -> Any:
        """Return the products with several layers, side by side."""
        y = op.MatMul(x, weights.side_by_side(f"{name}.weight", [f"{part}.weight" for part in parts]))
        biases = [f"{part}.bias" for part in parts]
        return op.Add(y, weights.side_by_side(f"{name}.bias", biases)) if biases[0] in weights else y

    def split_heads(x: Any) -> Any:
        """[batch, sequence, size] -> [batch, heads, sequence, width]"""
        return op.Transpose(op.Reshape(x, integers(op, [0, 0, heads, width])), perm=[0, 2, 1, 3])

    rotation = encoder.rotation()
    tables = None
    if rotation is not None:
        tables = [
            op.Gather(weights.add(f"rotation.{i}", table.contiguous().numpy()), positions)
            for i, table in enumerate(rotation)
        ]

    def rotated(x: Any) -> Any:
        if tables is None:
            return x
        first, second = op.Split(x, [width // 2, width // 2], axis=3, _outputs=2)
        cosines, sines = tables
        return op.Concat(
            op.Sub(op.Mul(first, cosines), op.Mul(second, sines)),
            op.Add(op.Mul(second, cosines), op.Mul(first, sines)),
            axis=3,
        )

    bias = None
    by_distance = encoder.relative_bias()
    if by_distance is not None:
        table = weights.add("relative_bias", by_distance.contiguous().numpy())
        behind = op.Sub(op.Unsqueeze(positions, integers(op, [0])), op.Unsqueeze(positions, integers(op, [1])))
        rows = op.Gather(table, op.Add(behind, integer(op, encoder.max_tokens - 1)))  # [queries, keys, heads]
        bias = op.Transpose(rows, perm=[2, 0, 1])

    x = op.Gather(weights(f"{family.words}.weight"), input_ids)
    if family.positions is not None:
        at = positions if not family.first_position else op.Add(positions, integer(op, family.first_position))
        x = op.Add(x, op.Gather(weights(f"{family.positions}.weight"), at))
    if family.types is not None and f"{family.types}.weight" in weights:
        first_type = encoder.model.state_dict()[f"{family.types}.weight"][0]
        x = op.Add(x, weights.add(f"{family.types}.0", first_type.numpy()))
    x = norm(x, family.norm)
    for i in range(config.num_hidden_layers):
        layer = family.layer.format(i)
        parts = tuple(f"{layer}.{name}" for name in family.projections)
        q, k, v = op.Split(linear(x, f"{layer}.qkv", parts), [size] * 3, axis=2, _outputs=3)
        q, k, v = rotated(split_heads(q)), rotated(split_heads(k)), split_heads(v)
        scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), real(op, 1 / math.sqrt(width)))
        scores = scores if bias is None else op.Add(scores, bias)
        heard = op.Transpose(op.MatMul(op.Softmax(scores, axis=-1), v), perm=[0, 2, 1, 3])
        heard = op.Reshape(heard, integers(op, [0, 0, size]))
        y = linear(heard, f"{layer}.{family.output}.transposed", (f"{layer}.{family.output}",))
        x = norm(op.Add(x, y), f"{layer}.{family.attention_norm}")
        inner = linear(x, f"{layer}.inner", tuple(f"{layer}.{name}" for name in family.inner))
        if len(family.inner) == 2:
            gate, up = op.Split(inner, [config.intermediate_size] * 2, axis=2, _outputs=2)
            inner = op.Mul(op.Gelu(gate), up)
        else:
            inner = op.Gelu(inner)
        y = linear(inner, f"{layer}.{family.outer}.transposed", (f"{layer}.{family.outer}",))
        x = norm(op.Add(x, y), f"{layer}.{family.mlp_norm}")
    if encoder.pooling == "cls":
        pooled = op.Gather(x, integer(op, 0), axis=1)
    else:
        pooled = op.ReduceMean(x, integers(op, [1]), keepdims=0)
    if encoder.normalize:
        mean = op.ReduceMean(op.Mul(pooled, pooled), integers(op, [-1]))
        root = op.Mul(op.Sqrt(mean), real(op, math.sqrt(size)))
        pooled = op.Div(pooled, op.Max(root, real(op, 1e-12)))
    builder.add_output(pooled, "embeddings")
    declare(graph.outputs[-1], ["batch", size])
    return ir.Model(graph, ir_version=10, producer_name="chameleon_deploy")
