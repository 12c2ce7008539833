"""Products in 8 bits for ONNX Runtime on the CPU, in which no row enters another.

Its own dynamic quantisation takes one scale for a whole tensor, so that a request changes its neighbours' results.
Here activations are rounded to a digit of 8 bits, multiplied by int8 weights in one integer product, and scaled back:

    after a norm     they come in steps that were fixed at export (rotation.py): nothing is searched, divided or
                     scaled back, and the bias is the operator's own
    everything else  in steps of each row's own, by its highest value: what attention and activation functions give
                     varies too much from row to row

One digit is enough, since activations come without outliers (rotation.py), but for the first layer: its errors pass
through all others. There a second digit is what the first leaves, 255 times finer, and the product twice as long.
Digits are unsigned around 128 because the kernels for signed ones are many times slower.

Operator: com.microsoft.MatMulIntegerToFloat
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.export.decoder import HEAD
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.graph import constant
from chameleon_deploy.export.int8.calibration import STEPS

ZERO_POINT = 128
FINER = 255  # the second digit spans half a step of the first on either side


def quantize_rows(decoder: ir.Model, model: ModelSpec) -> int:
    """Rewrite every product with int8 weights of a decoder in place. Returns how many were rewritten."""
    graph = decoder.graph
    layers = [family_of(model.architecture).matrix_names(i) for i in range(model.num_layers)]
    first_layer, after_norm = set(layers[0]), {HEAD, *(name for names in layers for name in (names.qkv, names.up))}
    last_axis = constant(graph, "int8_rows.last_axis", np.array([-1]))
    smallest = constant(graph, "int8_rows.smallest", np.float32(1e-30))  # for a row of zeros
    part = constant(graph, "int8_rows.part", np.float32(1 / STEPS))
    one = constant(graph, "int8_rows.one", np.float32(1))
    finer = constant(graph, "int8_rows.finer", np.float32(FINER))
    zero_point = constant(graph, "int8_rows.zero_point", np.uint8(ZERO_POINT))

    def one_digit(op: Any, x: Any, weight: Any, scale: Any, bias: Any = None, step: Any = one) -> Any:
        digits = op.QuantizeLinear(x, step, zero_point)
        return op.MatMulIntegerToFloat(digits, weight, step, scale, zero_point, None, bias, _domain="com.microsoft")

    def two_digits(op: Any, x: Any, weight: Any, scale: Any, step: Any = one) -> Any:
        rest = op.Sub(x, op.DequantizeLinear(op.QuantizeLinear(x, step, zero_point), step, zero_point))
        both = one_digit(op, op.Concat(x, op.Mul(rest, finer), axis=0), weight, scale, step=step)
        coarse, fine = op.Split(both, axis=0, num_outputs=2, _outputs=2)
        return op.Add(coarse, op.Div(fine, finer))

    def by_row(digits: Callable[..., Any]) -> Callable[..., Any]:
        def product(op: Any, x: Any, weight: Any, scale: Any) -> Any:
            highest = op.Max(op.ReduceMax(op.Abs(x), last_axis), smallest)  # [..., 1]
            return op.Mul(digits(op, op.Mul(x, op.Reciprocal(highest)), weight, scale, step=part), highest)

        return product

    def weight_only(op: Any, x: Any, weight: Any, scale: Any) -> Any:
        return op.MatMul(x, op.DequantizeLinear(weight, scale, axis=1))

    def with_bias(op: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
        return op.Add(weight_only(op, x, weight, scale), bias)

    def is_after_norm(context: Any, weight: Any, **_: Any) -> bool:
        return str(weight.name).removesuffix(".int8") in after_norm

    def is_first(context: Any, weight: Any, **_: Any) -> bool:
        return str(weight.name).removesuffix(".int8") in first_layer

    def is_first_after_norm(context: Any, weight: Any, **_: Any) -> bool:
        return is_first(context, weight) and is_after_norm(context, weight)

    def has_bias(context: Any, weight: Any, bias: Any, **_: Any) -> bool:
        return is_after_norm(context, weight) and not is_first(context, weight) and bool(bias.is_initializer())

    decoder.opset_imports["com.microsoft"] = 1
    rules = [
        RewriteRule(with_bias, one_digit, has_bias),
        RewriteRule(weight_only, two_digits, is_first_after_norm),
        RewriteRule(weight_only, one_digit, is_after_norm),
        RewriteRule(weight_only, by_row(two_digits), is_first),
        RewriteRule(weight_only, by_row(one_digit)),
    ]
    return int(RewriteRuleSet(rules).apply_to_model(decoder))
