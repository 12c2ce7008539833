"""int8 weights: every product with a stored matrix gets its weights through DequantizeLinear.

Each output channel has one symmetric scale, so that a column's error does not depend on the others. The trunk is
rotated already (rotation.py), so that no outlier determines a scale. Outputs of an activation function and the final
hidden states are rotated here: x W = (x H)(H W), a small product before the large one. gptq.py rounds.

The graph stays portable: DequantizeLinear is a standard operator
(https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html), and TensorRT takes int8 in no other form. Embeddings,
which are looked up rather than multiplied, norms and biases stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.export.decoder import HEAD
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.graph import constant, integers, subgraph, take_nodes
from chameleon_deploy.export.int8.calibration import INT8_MAX, Activations
from chameleon_deploy.export.int8.gptq import round_weights
from chameleon_deploy.export.int8.hadamard import block_of, hadamard, rotate
from chameleon_deploy.export.weights import WeightsFile

ROTATION = "int8_weights.rotation_{}"  # formatted with the number of channels


def quantize_weights(decoder: ir.Model, activations: Mapping[str, Activations], weights_file: WeightsFile) -> int:
    """Rewrite a portable decoder of a rotated trunk in place, with its int8 matrices in weights_file. Returns their
    number.

    activations  by the graph's name of a matrix (calibration.py)
    """

    def product(op: Any, x: Any, weight: Any, transpose: bool) -> Any:
        matrix = torch.tensor(weight.const_value.numpy())
        matrix = matrix.T if transpose else matrix
        seen = activations[weight.name]
        if seen.rotated:
            matrix = rotate(matrix.T).T
            x = rotated(op, x, len(matrix), decoder.graph)
        if weight.name == HEAD:  # the update shares the last norm's weights, so the scales are applied here
            scale = seen.absmax / INT8_MAX
            seen, matrix = seen.divided(scale), matrix * scale[:, None]
            x = op.Mul(x, constant(decoder.graph, "int8_weights.steps", (1 / scale).numpy()))
        names = f"{weight.name}.int8", f"{weight.name}.scale"
        stored = [
            op.initializer(weights_file.add(name, array.numpy()), name)
            for name, array in zip(names, round_weights(matrix, seen.products), strict=True)
        ]
        return op.MatMul(x, op.DequantizeLinear(*stored, axis=1))

    def is_stored(context: Any, weight: Any, **_: Any) -> bool:
        return isinstance(weight.const_value, ir.ExternalTensor)

    rules = [
        RewriteRule(
            lambda op, x, weight: op.MatMul(x, weight),
            lambda op, x, weight, **_: product(op, x, weight, transpose=False),
            is_stored,
        ),
        RewriteRule(  # the head: integer products take the matrix as [in, out]
            lambda op, x, weight: op.Gemm(x, weight, transB=1),
            lambda op, x, weight, **_: product(op, x, weight, transpose=True),
            is_stored,
        ),
    ]
    count = RewriteRuleSet(rules).apply_to_model(decoder)
    RemoveUnusedNodesPass()(decoder)
    return int(count)


def rotate_residual(decoder: ir.Model, model: ModelSpec) -> None:
    """Rotate token embeddings after the lookup, and rotate back before the last norm, in place.

    The table itself, on which clusters depend, is unchanged.
    """
    graph, family = decoder.graph, family_of(model.architecture)
    (lookup,) = graph.initializers[family.token_embedding].consumers()
    (norm,) = graph.initializers[f"{family.last_norm}.weight"].consumers()
    embedded, last = lookup.outputs[0], norm.inputs[0]
    for value, takers in ((embedded, embedded.consumers()), (last, [norm])):
        _rotate_value(graph, value, takers, model.hidden_size)


def _rotate_value(graph: ir.Graph, value: Any, takers: Iterable[ir.Node], channels: int) -> None:
    """Give the takers of a value its rotated form."""
    part = subgraph(graph, f"{value.name}.rotated", lambda op: [rotated(op, value, channels, graph)])
    nodes, (turned,) = take_nodes(part)
    graph.insert_after(value.producer(), nodes)
    for taker in takers:
        taker.replace_input_with(taker.inputs.index(value), turned)


def rotated(op: Any, x: Any, channels: int, graph: ir.Graph) -> Any:
    """Return x H for x [..., channels]."""
    block = block_of(channels)
    name = ROTATION.format(block)
    rotation = graph.initializers.get(name) or constant(graph, name, hadamard(block).numpy())
    return op.Reshape(op.MatMul(op.Reshape(x, integers(op, [-1, block])), rotation), op.Shape(x))
