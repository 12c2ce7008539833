"""16-bit products, float16 or bfloat16, for TensorRT and for ONNX Runtime on CUDA.

Every product of the trunk multiplies 16-bit tensors; the rest of the graph (layer norms, softmax, residuals, activation
functions, the low-rank update) is float32. The head's operands are rounded to 16 bits, and its sums and logits are
float32. The key-value cache is 16 bits, since it enters only products. Embeddings, which are looked up rather than
multiplied, stay float32.

`float_products` makes the variant for ONNX Runtime on the CPU, which has no 16-bit kernels: the same numbers rounded at
the same places, multiplied and kept in float32.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from chameleon_deploy.export.graph import FLOAT
from chameleon_deploy.export.low_rank import STACKED
from chameleon_deploy.export.weights import WeightsFile, narrowed

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LAYOUT = ("Transpose", "Reshape", "Unsqueeze", "Expand")  # move numbers of any type


def halve_products(decoder: ir.Model, half: ir.DataType, weights_file: WeightsFile) -> int:
    """Rewrite a portable decoder in place, with its 16-bit matrices in weights_file. Returns the number of products.

    Raises TensorError for a weight that float16 cannot represent.
    """
    graph = decoder.graph
    _set_cache(graph, half)
    count = 0
    for node in list(graph):
        _pass_type_on(node, half)
        # The low-rank update of the head also uses Gemm, but its matrices are inputs.
        is_head = node.op_type == "Gemm" and _stored(node.inputs[1]) is not None
        if not is_head and not _is_product(node):
            continue
        count += 1
        for index in (0, 1):
            if weight := _stored(node.inputs[index]):
                rounded: ir.Value | None = _half_weight(graph, weight, half, weights_file)
            else:
                rounded = _cast(graph, node, node.inputs[index], half)
            node.replace_input_with(index, _cast(graph, node, rounded, FLOAT) if is_head else rounded)
        if not is_head:
            _cast_output(graph, node, half, FLOAT)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return count


def float_products(decoder: ir.Model) -> int:
    """Rewrite a decoder of `halve_products` in place, for the CPU. Returns the number of products."""
    graph = decoder.graph
    half = next(value.dtype for value in graph.inputs if _is_past(value) and value.dtype is not None)
    _set_cache(graph, FLOAT)
    count = 0
    for node in list(graph):
        _pass_type_on(node, FLOAT)
        if _is_product(node):
            count += 1
            for index, operand in enumerate(node.inputs):
                node.replace_input_with(index, _cast(graph, node, operand, FLOAT))
            _cast_output(graph, node, FLOAT, half)
    return count


def _is_product(node: ir.Node) -> bool:
    """Return whether a node is a product of the trunk, and not of a low-rank update, which stays float32."""
    return node.op_type == "MatMul" and not str(node.inputs[1] and node.inputs[1].name).endswith(STACKED)


def _is_past(value: ir.Value) -> bool:
    return str(value.name).startswith("past_key_values.")


def _set_cache(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Give past and present a type; appended values are rounded to 16 bits in any case."""
    for past in filter(_is_past, graph.inputs):
        past.dtype = dtype
        (append,) = (node for node, _ in past.uses() if node.op_type == "Concat")
        append.replace_input_with(1, _cast(graph, append, append.inputs[1], dtype))
        append.outputs[0].dtype = dtype


def _pass_type_on(node: ir.Node, dtype: ir.DataType) -> None:
    """Keep the cache's type of keys and values up to the product that takes them."""
    if node.op_type in LAYOUT and _comes_from_cache(node):
        node.outputs[0].dtype = dtype


def _comes_from_cache(node: ir.Node | None) -> bool:
    if node is not None and node.op_type == "Concat":
        return node.inputs[0] is not None and _is_past(node.inputs[0])
    return node is not None and node.op_type in LAYOUT and _comes_from_cache(_producer(node.inputs[0]))


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    tensor = value.const_value if value is not None else None
    return tensor if isinstance(tensor, ir.ExternalTensor) else None


def _half_weight(graph: ir.Graph, weight: ir.TensorProtocol, half: ir.DataType, weights_file: WeightsFile) -> ir.Value:
    """Return the rounded copy of a stored matrix as a new initializer."""
    name = f"{weight.name}.{half.short_name()}"
    tensor = weights_file.add(name, narrowed(weight.numpy(), half.numpy(), str(weight.name)))
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(half))
    graph.register_initializer(value)
    return value


def _cast(graph: ir.Graph, before: ir.Node, value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    """Return a value as another type, with a cast before a node unless it has that type."""
    if value is None or value.dtype == dtype:
        return value
    tape = Tape()
    cast = tape.op("Cast", [value], {"to": dtype})
    cast.dtype, cast.shape = dtype, value.shape
    graph.insert_before(before, tape.nodes)
    return cast


def _cast_output(graph: ir.Graph, node: ir.Node, computed: ir.DataType, dtype: ir.DataType) -> None:
    """Cast the output of a node from the type that it computes in, for all its consumers."""
    output, uses = node.outputs[0], list(node.outputs[0].uses())
    output.dtype = computed
    tape = Tape()
    cast = tape.op("Cast", [output], {"to": dtype})
    cast.dtype, cast.shape = dtype, output.shape
    graph.insert_after(node, tape.nodes)
    for user, index in uses:
        user.replace_input_with(index, cast)
