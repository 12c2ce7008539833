"""int8 and int4 weights: every product with a stored matrix gets its weights through DequantizeLinear.

Each output channel has one symmetric scale, so that a column's error does not depend on the others. The trunk is
rotated already (rotation.py), so that no outlier determines a scale. In int4 the trunk's matrices have 4 bits and a
scale for every 32 weights (blocks.py); one whose inputs are no whole number of blocks keeps 8 bits. Outputs of an
activation function and the final hidden states are rotated here: x W = (x H)(H W), a small product before the large
one. gptq.py rounds.

The head's matrix is [vocab, hidden], so that its rows serve the token embedding too, in the rotated form that the trunk
takes.

The graph stays portable: DequantizeLinear is a standard operator
(https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html), and TensorRT takes int8 in no other form. Positions, norms
and biases stay float32.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet
from torch import Tensor

from chameleon_deploy.contract.bundle import HEAD, HEAD_BALANCE, int8_names
from chameleon_deploy.export.decoder import channel_scales
from chameleon_deploy.export.graph import constant, initializer, integers, subgraph, take_nodes
from chameleon_deploy.export.hadamard import block_of, hadamard, rotate
from chameleon_deploy.export.int8.blocks import INT4_OPSET, block_product, store_blocks
from chameleon_deploy.export.int8.calibration import Statistics
from chameleon_deploy.export.int8.gptq import BLOCK, column_scales, round_blocks, round_weights
from chameleon_deploy.export.int8.rotation import balance
from chameleon_deploy.export.weights import WeightsFile, alias
from chameleon_deploy.reference.families.spec import DecoderSpec
from chameleon_deploy.terminal.progress import Progress

ROTATION = "int8_weights.rotation_{}"  # formatted with the number of channels


def quantize_weights(
    decoder: ir.Model,
    model: DecoderSpec,
    statistics: Statistics,
    weights_file: WeightsFile,
    report: Progress,
    bits: Literal[4, 8] = 8,
) -> int:
    """Rewrite a portable decoder of a rotated trunk in place, with its rounded matrices in weights_file. Returns their
    number.

    bits  of the trunk's matrices
    """
    layers = [model.matrices(i) for i in range(model.num_layers)]
    after_activation, done = {names.down for names in layers}, itertools.count()

    def product(op: Any, x: Any, weight: Any) -> Any:
        report("round weights", next(done), 4 * len(layers) + 1)
        matrix, products = taken(weight), statistics.inputs[weight.name]
        groups = products.groups
        if weight.name in after_activation:
            matrix, groups = rotate(matrix.T).T, products.rotated().groups
            x = rotated(op, x, len(matrix), decoder.graph)
        if bits == 4 and len(matrix) % BLOCK == 0:
            int4, scale = round_blocks(matrix, groups)
            return block_product(op, x, *store_blocks(op, weights_file, weight.name, int4, scale))
        return op.MatMul(x, op.DequantizeLinear(*store(op, weight.name, *round_weights(matrix, groups)), axis=1))

    def head(op: Any, x: Any, weight: Any) -> Any:
        """Rotate and balance the inputs here, since the update shares the last norm."""
        report("round weights", next(done), 4 * len(layers) + 1)
        matrix = rotate(taken(weight))
        x = rotated(op, x, matrix.shape[1], decoder.graph, axes=2)
        factors, products = head_balance(matrix, statistics), statistics.inputs[HEAD].rotated()
        x = op.Mul(x, constant(decoder.graph, HEAD_BALANCE, factors.numpy()))
        products.divide(1 / factors)
        int8, scale = round_weights((matrix / factors).T, products.groups)
        int8, scale = store(op, HEAD, int8.T, scale)
        return op.Gemm(x, op.DequantizeLinear(int8, scale, axis=0), transB=1)

    def taken(weight: Any) -> Tensor:
        """Return a copy of a matrix, whose pages of the file are released."""
        matrix = torch.tensor(weight.const_value.numpy())
        weight.const_value.release()
        return matrix

    def store(op: Any, name: str, int8: Tensor, scale: Tensor) -> list[Any]:
        arrays = zip(int8_names(name), (int8, scale), strict=True)
        return [op.initializer(weights_file.add(part, array.numpy()), part) for part, array in arrays]

    def is_stored(context: Any, weight: Any, **_: Any) -> bool:
        return isinstance(weight.const_value, ir.ExternalTensor)

    rules = [
        RewriteRule(lambda op, x, weight: op.MatMul(x, weight), product, is_stored),
        RewriteRule(lambda op, x, weight: op.Gemm(x, weight, transB=1), head, is_stored),
    ]
    if bits == 4:
        decoder.opset_imports[""] = INT4_OPSET
    count = RewriteRuleSet(rules).apply_to_model(decoder)
    RemoveUnusedNodesPass()(decoder)
    return int(count)


def quantize_embedding(
    decoder: ir.Model, model: DecoderSpec, statistics: Statistics, tied: bool, weights_file: WeightsFile
) -> None:
    """Give the lookup of a decoder with int8 weights rotated int8 rows, in place.

    tied  take the rows of the head, which are rotated already, and undo the balance of their channels
    """
    graph = decoder.graph
    table = graph.initializers[f"{model.names.embedding}.weight"]
    stored: Any = table.const_value
    names, matrix = int8_names(str(table.name)), rotate(torch.tensor(stored.numpy()))
    if tied:
        tensors = [alias(graph.initializers[head], name) for head, name in zip(int8_names(HEAD), names, strict=True)]
        channels = head_balance(matrix, statistics)
    else:
        scale = column_scales(matrix.T)
        int8 = (matrix / scale[:, None]).round().to(torch.int8)
        tensors = [weights_file.add(name, array.numpy()) for name, array in zip(names, (int8, scale), strict=True)]
        channels = torch.ones(model.hidden_size)
    tensors.append(weights_file.add(channel_scales(str(table.name)), channels.numpy()))
    rows, scales, by = (initializer(graph, tensor) for tensor in tensors)
    (lookup,) = table.consumers()
    part = subgraph(
        graph,
        "token_embedding",
        lambda op: [op.Mul(op.Gather(op.DequantizeLinear(rows, scales, axis=0), lookup.inputs[1]), by)],
    )
    nodes, (embedded,) = take_nodes(part)
    ir.convenience.replace_nodes_and_values(graph, lookup, [lookup], nodes, lookup.outputs, [embedded])
    del graph.initializers[str(table.name)]


def head_balance(matrix: Tensor, statistics: Statistics) -> Tensor:
    """Return the factors of the channels that the head reads, [hidden]; its rotated matrix [vocab, hidden] is divided
    by them.

    No rotation follows that would spread a row's largest value, which sets its scale. So they are half-way between
    those of the smallest sum of squares and those that make all channels equally large.
    """
    squares = statistics.inputs[HEAD].rotated().squares()
    return (balance(squares, matrix.square().sum(0)) * balance(squares, 1 / squares)).sqrt()


def rotate_residual(decoder: ir.Model, model: DecoderSpec) -> None:
    """Rotate the residual stream back before the last norm, in place, and rotate what norms add to it. The lookup
    rotates it.
    """
    graph = decoder.graph

    def turn(value: Any, name: str) -> ir.Value:
        nodes, (turned,) = take_nodes(subgraph(graph, name, lambda op: [rotated(op, value, model.hidden_size, graph)]))
        graph.insert_after(value.producer(), nodes)
        return turned

    (norm,) = graph.initializers[f"{model.names.last_norm}.weight"].consumers()
    norm.replace_input_with(0, turn(norm.inputs[0], "last_norm"))
    for name in model.post_norms():
        (norm,) = graph.initializers[f"{name}.weight"].consumers()
        added = norm.outputs[0]
        takers = list(added.uses())
        turned = turn(added, name)
        for node, index in takers:
            node.replace_input_with(index, turned)


def rotated(op: Any, x: Any, channels: int, graph: ir.Graph, axes: int = 3) -> Any:
    """Return x H for x [..., channels] of so many axes."""
    block = block_of(channels)
    name = ROTATION.format(block)
    rotation = graph.initializers.get(name) or constant(graph, name, hadamard(block).numpy())
    kept = [0] * (axes - 1)
    blocks = op.Reshape(x, integers(op, [*kept, channels // block, block]))
    return op.Reshape(op.MatMul(blocks, rotation), integers(op, [*kept, channels]))
