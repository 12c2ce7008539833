"""Matrices in 8 bits: every product with a stored matrix gets its weights through DequantizeLinear.

One scale per output channel, symmetric, so that a column's error does not depend on the others. What is
multiplied is rotated first, x W = (x H)(H W), in blocks of channels by a Hadamard matrix H, whose square is the
identity: it spreads an outlier, which would set the step of everything beside it, over the channels of its
block. That makes the weights' own error smaller, and one digit of 8 bits enough for activations (int8_rows.py).
Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (https://arxiv.org/abs/2404.00456),
which rotates all channels at once; blocks of 64 do as well here, and are a product that costs next to nothing.
What attention gives is rotated before it is there: the matrix that makes values makes them rotated, head by head.

The graph stays portable: DequantizeLinear is a standard operator
(https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html), and TensorRT takes int8 in no other form.
What is looked up rather than multiplied (embeddings), norms and biases stay float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from chameleon_deploy.bundle import FloatArray, ModelSpec
from chameleon_deploy.export.graph import constant, integers
from chameleon_deploy.export.weights import WeightsFile

LARGEST = 127  # -128 is not used: the scale is the same on both sides of zero
LARGEST_BLOCK = 64  # channels rotated together
# Names end so, GPT-2's and Llama's: what makes queries, keys and values, and what takes the values.
VALUES_FROM = ("attn.c_attn.weight", "attn.c_attn.bias", "attn.qkv_proj.weight")
VALUES_TO = ("attn.c_proj.weight", "attn.o_proj.weight")


def quantize_weights(decoder: ir.Model, model: ModelSpec, weights_file: WeightsFile) -> int:
    """Rewrite a portable decoder in place, its int8 matrices going to weights_file. Returns how many there are."""
    rotations: dict[int, ir.Value] = {}

    def rotation(block: int) -> ir.Value:
        if block not in rotations:
            rotations[block] = constant(decoder.graph, f"int8_weights.rotation_{block}", hadamard(block))
        return rotations[block]

    def product(op: Any, x: Any, weight: Any, transpose: bool) -> Any:
        matrix = weight.const_value.numpy()
        matrix = matrix.T if transpose else matrix
        if weight.name.endswith(VALUES_FROM):
            matrix = rotate_values(matrix, model)
        comes_rotated = weight.name.endswith(VALUES_TO)
        block = block_of(model.head_dim if comes_rotated else len(matrix))
        names = f"{weight.name}.int8", f"{weight.name}.scale"
        stored = [
            op.initializer(weights_file.add(name, array), name)
            for name, array in zip(names, quantize(rotate_channels(matrix, block)), strict=True)
        ]
        if not comes_rotated:
            blocks = op.MatMul(op.Reshape(x, integers(op, [-1, block])), rotation(block))
            x = op.Reshape(blocks, op.Shape(x))
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
    for name, value in decoder.graph.initializers.items():
        if name.endswith(VALUES_FROM) and value.const_value is not None:  # the biases: the matrices are gone
            value.const_value = weights_file.add(name, rotate_values(value.const_value.numpy(), model))
    return int(count)


def quantize(matrix: FloatArray) -> tuple[Any, FloatArray]:
    """float32 [in, out] -> int8 [in, out], float32 scale [out]: matrix is nearly int8 * scale"""
    scale = np.abs(matrix).max(0) / np.float32(LARGEST)
    scale = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))  # zeros, or next to: they become zeros
    return np.rint(matrix / scale).astype(np.int8), scale


def block_of(channels: int) -> int:
    """How many channels are rotated together: the largest power of two that divides them all, at most 64."""
    return min(channels & -channels, LARGEST_BLOCK)


def hadamard(block: int) -> FloatArray:
    """float32 [block, block] of entries +-block^-1/2 (Sylvester's construction), symmetric and its own inverse."""
    matrix: FloatArray = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(np.float32(block))
    return matrix


def rotate(x: FloatArray, block: int) -> FloatArray:
    """float32 [..., channels] -> x H"""
    rotated: FloatArray = x.reshape(*x.shape[:-1], -1, block) @ hadamard(block)
    return rotated.reshape(x.shape)


def rotate_channels(matrix: FloatArray, block: int) -> FloatArray:
    """float32 [in, out] -> H matrix: what a product with rotated activations needs."""
    blocks: FloatArray = np.matmul(hadamard(block), matrix.reshape(-1, block, matrix.shape[1]))
    return blocks.reshape(matrix.shape)


def rotate_values(qkv: FloatArray, model: ModelSpec) -> FloatArray:
    """float32 [..., queries, keys and values of all heads] -> the same with every head's values rotated."""
    num_values = model.num_key_value_heads * model.head_dim
    return np.concatenate([qkv[..., :-num_values], rotate(qkv[..., -num_values:], block_of(model.head_dim))], axis=-1)
