"""Products in 8 bits for ONNX Runtime on the CPU, in which no row enters another.

Its own dynamic quantisation takes one scale for a whole tensor, so that a request changes its neighbours'
results. Here a row is divided by its own highest value and written as digits of 8 bits, the digits of all rows
are multiplied by the int8 weights in one integer product, and its rows are scaled back. One digit is enough,
since activations come without outliers (int8_weights.py rotates them), but for the first layer: its errors pass
through all others, and were half of all there were. There a second digit is what the first leaves, 255 times
finer, and the product twice as long. Digits are unsigned around 128 because the kernels for signed ones are many
times slower.

Operator: com.microsoft.MatMulIntegerToFloat
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from chameleon_deploy.export.graph import constant

STEPS = 127  # on either side of zero
ZERO_POINT = 128
FINER = 255  # the second digit spans half a step of the first on either side
FIRST_LAYER = (".h.0.", ".layers.0.")  # in the names of its weights, GPT-2's and Llama's


def quantize_rows(decoder: ir.Model) -> int:
    """Rewrite every product with int8 weights of a decoder in place. Returns how many were rewritten."""

    last_axis = constant(decoder.graph, "int8_rows.last_axis", np.array([-1]))
    smallest = constant(decoder.graph, "int8_rows.smallest", np.float32(1e-30))  # for a row of zeros
    step = constant(decoder.graph, "int8_rows.step", np.float32(1 / STEPS))
    fine_step = constant(decoder.graph, "int8_rows.fine_step", np.float32(1 / STEPS / FINER))
    fine = constant(decoder.graph, "int8_rows.fine", np.float32(1 / FINER))
    zero_point = constant(decoder.graph, "int8_rows.zero_point", np.uint8(ZERO_POINT))

    def product(op: Any, digits: Any, weight: Any, scale: Any) -> Any:
        return op.MatMulIntegerToFloat(digits, weight, step, scale, zero_point, _domain="com.microsoft")

    def highest(op: Any, x: Any) -> Any:
        return op.Max(op.ReduceMax(op.Abs(x), last_axis), smallest)  # [..., 1]

    def one_digit(op: Any, x: Any, weight: Any, scale: Any) -> Any:
        unit = highest(op, x)
        digit = op.QuantizeLinear(op.Div(x, unit), step, zero_point)
        return op.Mul(product(op, digit, weight, scale), unit)

    def two_digits(op: Any, x: Any, weight: Any, scale: Any) -> Any:
        unit = highest(op, x)
        relative = op.Div(x, unit)
        first = op.QuantizeLinear(relative, step, zero_point)
        rest = op.Sub(relative, op.DequantizeLinear(first, step, zero_point))
        digits = op.Concat(first, op.QuantizeLinear(rest, fine_step, zero_point), axis=0)
        coarse, rest = op.Split(product(op, digits, weight, scale), axis=0, num_outputs=2, _outputs=2)
        return op.Mul(op.Add(coarse, op.Mul(rest, fine)), unit)

    def weight_only(op: Any, x: Any, weight: Any, scale: Any) -> Any:
        return op.MatMul(x, op.DequantizeLinear(weight, scale, axis=1))

    def is_of_first_layer(context: Any, weight: Any, **_: Any) -> bool:
        return any(part in weight.name for part in FIRST_LAYER)

    decoder.opset_imports["com.microsoft"] = 1
    rules = [RewriteRule(weight_only, two_digits, is_of_first_layer), RewriteRule(weight_only, one_digit)]
    return int(RewriteRuleSet(rules).apply_to_model(decoder))
