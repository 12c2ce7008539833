"""hypernetwork.onnx: conditioning [factor_sets, hidden] -> the factor tensors in the layout of the decoder's inputs.

The reference's last layer returns lora_B as [vocab, rank]. Its rows are reordered here so that the graph returns [rank,
vocab] without a transpose, and alpha is multiplied into them, so that the decoder only computes the two products.

Nearly all of its weights are that layer's. They may be stored in float16; ONNX Runtime turns them into float32 when it
opens the graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from chameleon_deploy.bundle import LM_HEAD, FloatArray, ModelSpec, factor_names
from chameleon_deploy.export.graph import FLOAT, OPSET
from chameleon_deploy.export.weights import WeightsFile, narrowed


def fold_lora_B(lora_B: FloatArray, alpha: float) -> FloatArray:
    """Return alpha * lora_B transposed: [vocab, rank, ...] -> [rank, vocab, ...]."""
    return np.ascontiguousarray(np.swapaxes(lora_B, 0, 1) * np.float32(alpha))


def build_hypernetwork(
    layers: list[tuple[FloatArray, FloatArray]],
    rank: int,
    alpha: float,
    model: ModelSpec,
    weights_file: WeightsFile,
    float16: bool = False,
) -> ir.Model:
    """Build the graph.

    layers   (weight [out, in], bias [out]) of each Linear; the last returns rank*hidden + vocab*rank numbers
    float16  store the last layer's matrices in float16

    Raises TensorError for a weight that float16 cannot represent.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="hypernetwork")
    builder = GraphBuilder(graph)
    op = builder.op

    def initializer(name: str, array: FloatArray) -> ir.Value:
        return builder.initializer(weights_file.add(f"hypernetwork.{name}", array), name)

    def rounded(name: str, array: FloatArray) -> ir.Value:
        value: ir.Value = op.Cast(initializer(name, narrowed(array, np.dtype(np.float16), name)), to=FLOAT)
        return value

    x = builder.input("conditioning", FLOAT, ["factor_sets", model.hidden_size])
    *inner, (weight, bias) = layers
    for i, (w, b) in enumerate(inner):
        x = op.Relu(op.Gemm(x, initializer(f"{i}.weight", w), initializer(f"{i}.bias", b), transB=1))
    split = rank * model.hidden_size
    name_A, name_B = factor_names(LM_HEAD)
    parts = {
        name_A: (weight[:split], bias[:split], model.hidden_size),
        name_B: (
            fold_lora_B(weight[split:].reshape(model.vocab_size, rank, -1), alpha).reshape(rank * model.vocab_size, -1),
            fold_lora_B(bias[split:].reshape(model.vocab_size, rank), alpha).reshape(-1),
            model.vocab_size,
        ),
    }
    matrix = rounded if float16 else initializer
    for name, (w, b, width) in parts.items():
        flat = op.Gemm(x, matrix(f"{name}.weight", w), initializer(f"{name}.bias", b), transB=1)
        builder.add_output(op.Reshape(flat, [-1, rank, width]), name)
        graph.outputs[-1].shape = ir.Shape(["factor_sets", rank, width])
        graph.outputs[-1].type = ir.TensorType(FLOAT)
    return ir.Model(graph, ir_version=10, producer_name="chameleon_deploy")
