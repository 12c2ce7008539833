"""Matrices in 8 bits: every product with a stored matrix gets its weights through DequantizeLinear.

One scale per output channel, symmetric, so that a column's error does not depend on the others. The graph
stays portable: DequantizeLinear is a standard operator
(https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html), and TensorRT takes int8 in no other form.
What is looked up rather than multiplied (embeddings), norms and biases stay float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from chameleon_deploy.bundle import FloatArray
from chameleon_deploy.export.weights import WeightsFile

LARGEST = 127  # -128 is not used: the scale is the same on both sides of zero


def quantize_weights(decoder: ir.Model, weights_file: WeightsFile) -> int:
    """Rewrite a portable decoder in place, its int8 matrices going to weights_file. Returns how many there are."""

    def int8(op: Any, weight: Any, transpose: bool) -> Any:
        matrix = weight.const_value.numpy()
        quantized, scale = quantize(matrix.T if transpose else matrix)
        names = f"{weight.name}.int8", f"{weight.name}.scale"
        stored = [
            op.initializer(weights_file.add(name, array), name)
            for name, array in zip(names, (quantized, scale), strict=True)
        ]
        return op.DequantizeLinear(*stored, axis=1)

    def is_stored(context: Any, weight: Any, **_: Any) -> bool:
        return isinstance(weight.const_value, ir.ExternalTensor)

    rules = [
        RewriteRule(
            lambda op, x, weight: op.MatMul(x, weight),
            lambda op, x, weight, **_: op.MatMul(x, int8(op, weight, transpose=False)),
            is_stored,
        ),
        RewriteRule(  # the head: integer products take the matrix as [in, out]
            lambda op, x, weight: op.Gemm(x, weight, transB=1),
            lambda op, x, weight, **_: op.MatMul(x, int8(op, weight, transpose=True)),
            is_stored,
        ),
    ]
    count = RewriteRuleSet(rules).apply_to_model(decoder)
    RemoveUnusedNodesPass()(decoder)
    return int(count)


def quantize(matrix: FloatArray) -> tuple[Any, FloatArray]:
    """float32 [in, out] -> int8 [in, out], float32 scale [out]: matrix is nearly int8 * scale"""
    highest = np.abs(matrix).max(0)
    scale = np.where(highest > 0, highest, 1).astype(np.float32) / np.float32(LARGEST)
    return np.rint(matrix / scale).astype(np.int8), scale
