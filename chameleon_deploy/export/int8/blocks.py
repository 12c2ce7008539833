"""Weights of 4 bits in blocks: each output channel has a scale for every 32 of its weights.

They are stored once, [out, in], two in a byte. The portable graph restores them as standard ONNX does, by the
DequantizeLinear of opset 21 (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html), signed, as TensorRT takes
them. ONNX Runtime's product on the CPU reads the same bytes in the same order, but unsigned around 8: the highest bit
of each value is inverted, once, while the graph is opened. Operator: com.microsoft.MatMulNBits
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).

That product rounds activations to int8, with a scale for every 32 of a row: rows share none. Its sums of integers are
exact on every processor: two products of an unsigned 4-bit and a signed 8-bit number fit into 16 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet
from torch import Tensor

from chameleon_deploy.export.graph import constant, initializer
from chameleon_deploy.export.int8.gptq import BLOCK
from chameleon_deploy.export.weights import WeightsFile, alias
from chameleon_deploy.reference.families.spec import DecoderSpec

INT4_OPSET = 21  # the first whose DequantizeLinear has blocks and 4 bits
INT8_ACTIVATIONS = 4  # the operator's accuracy level; 1 would be float32
HIGHEST_BITS = 0x88  # of both values in a byte


def store_blocks(op: Any, weights_file: WeightsFile, name: str, int4: Tensor, scale: Tensor) -> tuple[Any, Any]:
    """Write what `gptq.round_blocks` gives, and return its initializers, int4 [out, in] and scale [out, in / 32]."""
    values, scales = f"{name}.int4", f"{name}.scale"
    return (
        op.initializer(weights_file.add_int4(values, int4.T.contiguous().numpy()), values),
        op.initializer(weights_file.add(scales, scale.T.contiguous().numpy()), scales),
    )


def block_product(op: Any, x: Any, int4: Any, scale: Any) -> Any:
    """Return x [..., in] times a stored matrix of 4 bits, in standard operators."""
    restored = op.DequantizeLinear(int4, scale, axis=1, block_size=BLOCK)
    return op.MatMul(x, op.Transpose(restored, perm=[1, 0]))


def multiply_blocks(decoder: ir.Model, model: DecoderSpec) -> int:
    """Rewrite every product with 4-bit weights of a decoder in place, with its bias. Returns how many."""
    graph = decoder.graph
    highest_bits = constant(graph, "int4.highest_bits", np.uint8(HIGHEST_BITS))

    def with_bias(op: Any, x: Any, int4: Any, scale: Any, bias: Any) -> Any:
        return op.Add(block_product(op, x, int4, scale), bias)

    def product(op: Any, x: Any, int4: Any, scale: Any, bias: Any = None) -> Any:
        width, channels = int4.shape.numpy()
        by_block = [width, channels // BLOCK, BLOCK // 2]
        stored = initializer(graph, alias(int4, f"{int4.name}.bytes", ir.DataType.UINT8, by_block))
        return op.MatMulNBits(
            x, op.BitwiseXor(stored, highest_bits), scale, None, None, bias,
            K=channels, N=width, bits=4, block_size=BLOCK, accuracy_level=INT8_ACTIVATIONS, _domain="com.microsoft",
        )  # fmt: skip

    def has_stored_bias(context: Any, bias: Any, **_: Any) -> bool:
        return bool(bias.is_initializer())

    decoder.opset_imports["com.microsoft"] = 1
    sums = RewriteRuleSet([RewriteRule(with_bias, product, has_stored_bias)])
    products = RewriteRuleSet([RewriteRule(block_product, product)])
    return int(sums.apply_to_model(decoder)) + int(products.apply_to_model(decoder))
