"""The parts of every graph: the operator set, element types, constants, subgraphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

OPSET = 20  # standard operators of this version only: NVIDIA's parser builds 18 to 22, and refuses Attention of 23
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def integer(op: Any, value: int) -> Any:
    return op.Constant(value_int=value)


def integers(op: Any, values: list[int]) -> Any:
    return op.Constant(value_ints=values)


def real(op: Any, value: float) -> Any:
    return op.Constant(value_float=value)


def soft_cap(op: Any, x: Any, cap: float | None) -> Any:
    """Return cap * tanh(x / cap), as Gemma 2 bounds scores and logits (https://arxiv.org/abs/2408.00118); x without a
    cap.
    """
    return x if cap is None else op.Mul(op.Tanh(op.Mul(x, real(op, 1 / cap))), real(op, cap))


def declare(value: ir.Value, shape: list[int | str]) -> None:
    """Give a float32 output its shape."""
    value.shape, value.type = ir.Shape(shape), ir.TensorType(FLOAT)


def copy_of(model: ir.Model) -> ir.Model:
    """Return a copy that passes can rewrite without changing the model; tensors are shared."""
    copied = model.clone()
    graph = copied.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in values:
        value.type = copy.copy(value.type)  # clone shares types, and passes change them in place
    return copied


def constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """Return a numpy array or scalar as a constant stored in the graph itself."""
    return initializer(graph, ir.tensor(array, name=name))


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Return a tensor as an initializer of its name."""
    shape: Any = tensor.shape
    value = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def subgraph(graph: ir.Graph, name: str, build: Callable[[Any], Any]) -> ir.Graph:
    """Build a graph without inputs, which may use every value of `graph` and whose new names are unique.

    build  from an operator builder to outputs
    """
    built = ir.Graph([], [], nodes=[], opset_imports=graph.opset_imports, name=name)
    built.outputs.extend(build(GraphBuilder(built).op))
    for node in built:
        node.name = f"{name}.{node.name}"
        for value in node.outputs:
            value.name = f"{name}.{value.name}"
    return built


def take_nodes(built: ir.Graph) -> tuple[list[ir.Node], list[ir.Value]]:
    """Remove and return the nodes and outputs of a subgraph, to be inserted elsewhere."""
    nodes, outputs = list(built), list(built.outputs)
    built.outputs.clear()
    built.remove(nodes)
    return nodes, outputs
