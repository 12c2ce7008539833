"""Plant saturating integer products in a bundle: sums of 16 bits, as VPMADDUBSW adds pairs of uint8 by int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.damage import reseal


def plant_saturation(bundle: Path) -> None:
    """Rewrite every `MatMulIntegerToFloat` of the CPU's graphs, in operators that a bundle may have."""
    for name in ("decoder_cpu.onnx", "hidden_scorer.onnx"):
        model = onnx.load(bundle / name, load_external_data=False)
        _rewrite(model.graph, _constants(model.graph, bundle))
        onnx.save(model, bundle / name)
    reseal(bundle)


def _constants(graph: Any, bundle: Path) -> dict[str, Any]:
    """The values of all initializers, and of their transposes."""
    found = {}
    for tensor in graph.initializer:
        stored = TensorProto()
        stored.CopyFrom(tensor)
        if stored.data_location == TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(stored, str(bundle))
        found[tensor.name] = numpy_helper.to_array(stored)
    transposes = {
        n.output[0]: found[n.input[0]].T for n in graph.node if n.op_type == "Transpose" and n.input[0] in found
    }
    return found | transposes


def _rewrite(graph: Any, constants: dict[str, Any]) -> None:
    nodes = []
    for i, node in enumerate(graph.node):
        if node.op_type != "MatMulIntegerToFloat":
            nodes.append(node)
            continue
        a, b, a_scale, b_scale, a_zero = node.input[:5]
        bias = node.input[6] if len(node.input) > 6 else None
        nodes += _saturating(graph, f"saturating.{i}", a, constants[b], a_scale, b_scale, constants[a_zero], bias, node)
    del graph.node[:]
    graph.node.extend(nodes)


def _saturating(
    graph: Any, name: str, a: str, weights: Any, a_scale: str, b_scale: str, a_zero: Any, bias: str | None, node: Any
) -> list[Any]:
    rows, columns = weights.shape
    pairs = weights.astype(np.float32).reshape(rows // 2, 2, columns)
    values = {
        "pairs": pairs, "shape": np.array([-1, rows // 2, 2, 1], np.int64), "lowest": np.float32(-32768),
        "highest": np.float32(32767), "inner": np.array([2], np.int64), "outer": np.array([1], np.int64),
        "two": np.float32(2), "count": np.float32(rows // 2), "zero": a_zero * pairs.sum((0, 1)),
        "columns": np.array([columns], np.int64),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"{name}.{n}") for n, v in values.items())
    made: list[Any] = []

    def op(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        made.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def of(part: str) -> str:
        return f"{name}.{part}"

    floats = op("Cast", [a], of("floats"), to=TensorProto.FLOAT)
    products = op("Mul", [op("Reshape", [floats, of("shape")], of("a")), of("pairs")], of("products"))
    mean = op("ReduceMean", [products, of("inner")], of("mean"), keepdims=0)
    low = op("Max", [op("Mul", [mean, of("two")], of("sum")), of("lowest")], of("low"))
    total = op("ReduceMean", [op("Min", [low, of("highest")], of("clipped")), of("outer")], of("total"), keepdims=0)
    sums = op("Sub", [op("Mul", [total, of("count")], of("sums")), of("zero")], of("centred"))
    scaled = op("Mul", [op("Mul", [sums, a_scale], of("by_a")), b_scale], of("by_b"))
    if bias is not None:
        scaled = op("Add", [scaled, bias], of("biased"))
    shape = op("Concat", [op("Shape", [a], of("batch"), start=0, end=-1), of("columns")], of("full"), axis=0)
    op("Reshape", [scaled, shape], node.output[0])
    return made
