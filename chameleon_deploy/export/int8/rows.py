"""int8 products for ONNX Runtime on the CPU that keep rows independent.

ONNX Runtime's dynamic quantisation takes one scale for a whole tensor, so that one request changes the results of the
other rows. Here activations are rounded to int8, multiplied by int8 weights in one integer product, and scaled back:

    after a norm     centres and scales were fixed at export (rotation.py): nothing is searched, divided or scaled back,
                     and the bias is added by the operator
    everything else  one scale per row, from its absmax: outputs of attention and activation functions, the residual
                     stream, and the inputs of the head, vary too much from row to row for fixed scales

One int8 value per activation is enough for most matrices, since rotated activations have no outliers (rotation.py). For
those that digits.py chose, a second, residual int8 value holds the rounding error with a scale 254 times finer, and the
product takes twice as long. Values are unsigned around 128 because the kernels for signed ones
are many times slower.

Operator: com.microsoft.MatMulIntegerToFloat
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from chameleon_deploy.contract.bundle import int8_names
from chameleon_deploy.export.graph import FLOAT, constant, integers, subgraph, take_nodes
from chameleon_deploy.export.int8.calibration import INT8_MAX
from chameleon_deploy.reference.families.spec import DecoderSpec

ZERO_POINT = 128
RESIDUAL = 254  # the range of the second value is half a step of the first on either side
WIDE = 2  # steps after a norm, of the first of two values: what would saturate has room, and the second is fine enough


def quantize_rows(decoder: ir.Model, model: DecoderSpec, two_digits: Collection[str]) -> int:
    """Rewrite every product with int8 weights of a decoder in place. Returns how many were rewritten.

    two_digits  names of the matrices that take two int8 values per activation (digits.py)
    """
    graph = decoder.graph
    layers, norms = [model.matrices(i) for i in range(model.num_layers)], model.names
    after_norm = {names.qkv for names in layers if norms.attention_norm}
    after_norm |= {names.up for names in layers if norms.mlp_norm}
    last_axis = constant(graph, "int8_rows.last_axis", np.array([-1]))
    smallest = constant(graph, "int8_rows.smallest", np.float32(1e-30))  # for a row of zeros
    one, wide, of_row, wide_finer, of_row_finer, parts = (
        constant(graph, f"int8_rows.{name}", np.array(value, np.float32))
        for name, value in (
            ("one", 1),
            ("wide", WIDE),
            ("of_row", 1 / INT8_MAX),
            ("wide_finer", WIDE / RESIDUAL),
            ("of_row_finer", 1 / INT8_MAX / RESIDUAL),
            ("parts", [[1, 1 / RESIDUAL]]),
        )
    )
    zero_point = constant(graph, "int8_rows.zero_point", np.uint8(ZERO_POINT))
    shapes = _output_shapes(graph, model, two_digits)

    def rounded_product(op: Any, x: Any, weight: Any, scale: Any, bias: Any = None, x_scale: Any = one) -> Any:
        rounded = op.QuantizeLinear(x, x_scale, zero_point)
        return op.MatMulIntegerToFloat(rounded, weight, x_scale, scale, zero_point, None, bias, _domain="com.microsoft")

    def with_residual(op: Any, x: Any, weight: Any, scale: Any, bias: Any = None, x_scale: Any = wide) -> Any:
        rounded = op.QuantizeLinear(x, x_scale, zero_point)
        residual = op.Sub(x, op.DequantizeLinear(rounded, x_scale, zero_point))
        finer = wide_finer if x_scale is wide else of_row_finer
        both = op.Concat(rounded, op.QuantizeLinear(residual, finer, zero_point), axis=0)
        if bias is not None:  # of both products, so that it is added once and 1/254
            once = np.asarray(bias.const_value.numpy() * np.float32(RESIDUAL / (RESIDUAL + 1)))
            bias = constant(graph, f"{bias.name}.of_two", once)
        y = op.MatMulIntegerToFloat(both, weight, x_scale, scale, zero_point, None, bias, _domain="com.microsoft")
        # coarse + fine / 254, as a product of one row: it reads both once, where Split, Mul and Add copy them twice
        y = op.MatMul(parts, op.Reshape(y, integers(op, [2, -1])))
        return op.Reshape(y, shapes[str(weight.name)])

    def by_row(inner: Callable[..., Any]) -> Callable[..., Any]:
        def product(op: Any, x: Any, weight: Any, scale: Any) -> Any:
            absmax = op.Max(op.ReduceMax(op.Abs(x), last_axis), smallest)  # [..., 1]
            return op.Mul(inner(op, op.Mul(x, op.Reciprocal(absmax)), weight, scale, x_scale=of_row), absmax)

        return product

    def weight_only(op: Any, x: Any, weight: Any, scale: Any) -> Any:
        return op.MatMul(x, op.DequantizeLinear(weight, scale, axis=1))

    def with_bias(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
        return op.Add(weight_only(op, x, weight, scale), bias)

    def head(op: Any, x: Any, weight: Any, scale: Any) -> Any:
        return op.Gemm(x, op.DequantizeLinear(weight, scale, axis=0), transB=1)

    def rounded_head(op: Any, x: Any, weight: Any, scale: Any) -> Any:
        return by_row(rounded_product)(op, x, op.Transpose(weight, perm=[1, 0]), scale)

    def lookup(op: Any, weight: Any, scale: Any, ids: Any) -> Any:
        return op.Gather(op.DequantizeLinear(weight, scale, axis=0), ids)

    def lookup_first(op: Any, weight: Any, scale: Any, ids: Any) -> Any:
        rows = op.Cast(op.Gather(weight, ids), to=FLOAT)
        return op.Mul(rows, op.Unsqueeze(op.Gather(scale, ids), last_axis))

    def is_after_norm(context: Any, weight: Any, **_: Any) -> bool:
        return str(weight.name).removesuffix(".int8") in after_norm

    def has_two(context: Any, weight: Any, **_: Any) -> bool:
        return str(weight.name).removesuffix(".int8") in two_digits

    def has_two_after_norm(context: Any, weight: Any, **_: Any) -> bool:
        return has_two(context, weight) and is_after_norm(context, weight)

    def has_bias(context: Any, weight: Any, bias: Any, **_: Any) -> bool:
        return is_after_norm(context, weight) and bool(bias.is_initializer())

    def has_two_and_bias(context: Any, weight: Any, bias: Any, **_: Any) -> bool:
        return has_two(context, weight) and has_bias(context, weight, bias)

    decoder.opset_imports["com.microsoft"] = 1
    # Sums come after their products in a graph: in one set of rules the products would be rewritten first.
    sums = RewriteRuleSet(
        [RewriteRule(with_bias, with_residual, has_two_and_bias), RewriteRule(with_bias, rounded_product, has_bias)]
    )
    products = [
        RewriteRule(lookup, lookup_first),
        RewriteRule(head, rounded_head),
        RewriteRule(weight_only, with_residual, has_two_after_norm),
        RewriteRule(weight_only, rounded_product, is_after_norm),
        RewriteRule(weight_only, by_row(with_residual), has_two),
        RewriteRule(weight_only, by_row(rounded_product)),
    ]
    return int(sums.apply_to_model(decoder)) + int(RewriteRuleSet(products).apply_to_model(decoder))


def _output_shapes(graph: ir.Graph, model: DecoderSpec, names: Collection[str]) -> dict[str, ir.Value]:
    """Return the shape of what each of some matrices gives, int64 [3], by the matrix's name in int8: computed once for
    all matrices of a width.
    """
    inputs, last = {value.name: value for value in graph.inputs}, model.matrices(model.num_layers - 1)
    after_last_attention = (last.o, last.up, last.down)  # which are computed for some positions only
    shapes, shared = dict[str, ir.Value](), dict[tuple[str, int], ir.Value]()
    for name in sorted(names):
        stored, _ = int8_names(name)
        weight = graph.initializers.get(stored)
        if weight is None or weight.shape is None:
            continue
        key = "logits_positions" if name in after_last_attention else "input_ids", weight.shape.numpy()[1]
        if key not in shared:
            at, width = key

            def shape(op: Any, at: str = at, width: int = width) -> list[Any]:
                return [op.Concat(op.Shape(inputs[at]), integers(op, [width]), axis=0)]

            nodes, (shared[key],) = take_nodes(subgraph(graph, f"int8_rows.{at}.{width}", shape))
            graph.insert_before(graph[0], nodes)
        shapes[stored] = shared[key]
    return shapes
