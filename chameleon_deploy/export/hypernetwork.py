"""hypernetwork.onnx: conditioning [factor_sets, size] -> the factor tensors in the layout of the decoder's inputs.

The reference's last layers return lora_B as [out_features, rank]. Their rows are reordered here so that the graph
returns [rank, out_features] without a transpose, and alpha is multiplied into them, so that the decoder only computes
the two products.

Nearly all of its weights are those of these layers. They may be stored in float16; ONNX Runtime turns them into float32
when it opens the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder
from torch import Tensor, nn

from chameleon_deploy.contract.bundle import TargetSpec, factor_names
from chameleon_deploy.export.graph import FLOAT, OPSET, declare
from chameleon_deploy.export.text_to_lora import text_to_lora_factors
from chameleon_deploy.export.weights import WeightsFile, narrowed
from chameleon_deploy.reference.hypernetwork import Hypernetwork, SharedHypernetwork, split_factors
from chameleon_deploy.reference.text_to_lora import TextToLora

Store = Callable[[str, Tensor], ir.Value]  # a tensor as an initializer, which is written once under its name
# Name of a factor tensor, input of its last layer, name of that layer's parameters, and its weight and bias.
LastLayer = tuple[str, Any, str, Tensor, Tensor]


def build_hypernetwork(
    network: Hypernetwork | SharedHypernetwork | TextToLora,
    conditioning_size: int,
    alpha: float,
    weights_file: WeightsFile,
    float16: bool = False,
) -> ir.Model:
    """Build the graph of any architecture.

    float16  store the last layers' matrices in float16

    Raises TensorError for a weight that float16 cannot represent.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="hypernetwork")
    builder = GraphBuilder(graph)
    op = builder.op
    stored: dict[str, ir.Value] = {}

    def store(name: str, tensor: Tensor) -> ir.Value:
        if name not in stored:
            stored[name] = builder.initializer(weights_file.add(f"hypernetwork.{name}", tensor.numpy()), name)
        return stored[name]

    def rounded(name: str, tensor: Tensor) -> ir.Value:
        if name not in stored:
            array = narrowed(tensor.numpy(), np.dtype(np.float16), name)
            half = builder.initializer(weights_file.add(f"hypernetwork.{name}", array), name)
            stored[name] = op.Cast(half, to=FLOAT)
        return stored[name]

    matrix = rounded if float16 else store
    conditioning = builder.input("conditioning", FLOAT, ["factor_sets", conditioning_size])

    def products(last_layers: Iterator[LastLayer]) -> Iterator[tuple[str, Any]]:
        for name, x, parameters, weight, bias in last_layers:
            yield (
                name,
                op.Gemm(x, matrix(f"{parameters}.weight", weight), store(f"{parameters}.bias", bias), transB=1),
            )

    if isinstance(network, TextToLora):
        factors = text_to_lora_factors(op, store, network, conditioning, alpha)
    elif isinstance(network, SharedHypernetwork):
        factors = products(_shared(op, store, network, conditioning, alpha))
    else:
        factors = products(_paper(op, store, network, conditioning, alpha))
    widths = {
        name: width
        for target in network.targets
        for name, width in zip(factor_names(target.name), (target.in_features, target.out_features), strict=True)
    }
    for name, flat in factors:
        width = widths[name]
        builder.add_output(op.Reshape(flat, [-1, network.rank, width]), name)
        declare(graph.outputs[-1], ["factor_sets", network.rank, width])
    return ir.Model(graph, ir_version=10, producer_name="chameleon_deploy")


def _paper(op: Any, store: Store, network: Hypernetwork, conditioning: Any, alpha: float) -> Iterator[LastLayer]:
    """Build all but the last layer, which is shared by the factors of all targets."""
    x = conditioning
    *inner, last = network.linears()
    for i, layer in enumerate(inner):
        x = op.Relu(op.Gemm(x, store(f"{i}.weight", layer.weight), store(f"{i}.bias", layer.bias), transB=1))
    for name, (weight, bias) in _last_layers(last, network.targets, network.rank, alpha).items():
        yield name, x, name, weight, bias


def _shared(op: Any, store: Store, network: SharedHypernetwork, conditioning: Any, alpha: float) -> Iterator[LastLayer]:
    """Build all but the last layer for each target; its place is a bias of the first."""
    first = network.conditioning
    for target, place, (_, module) in zip(network.targets, network.place_embeddings(), network.places, strict=True):
        bias = store(f"{target.name}.place", first.bias + place)
        x = op.Relu(op.Gemm(conditioning, store("conditioning.weight", first.weight), bias, transB=1))
        for i, layer in enumerate(network.inner_layers()):
            x = op.Relu(op.Gemm(x, store(f"inner.{i}.weight", layer.weight), store(f"inner.{i}.bias", layer.bias),
                                transB=1))  # fmt: skip
        last = _last_layers(network.last_layers()[module], [target], network.rank, alpha)
        for (name, (weight, own_bias)), kind in zip(last.items(), ("lora_A", "lora_B"), strict=True):
            yield name, x, f"heads.{module}.{kind}", weight, own_bias


def _last_layers(
    linear: nn.Linear, targets: Sequence[TargetSpec], rank: int, alpha: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return weight [rank*width, columns] and bias of the rows that give each factor tensor [rank, width]."""

    def rows(name: str, parameter: Tensor) -> Tensor:
        """[columns, rank, in] or [columns, out, rank] -> [rank*width, columns]"""
        is_B = name.endswith(".lora_B")
        return (alpha * parameter.permute(2, 1, 0) if is_B else parameter.permute(1, 2, 0)).flatten(0, 1)

    weights, biases = (split_factors(p, targets, rank) for p in (linear.weight.T, linear.bias[None]))
    return {name: (rows(name, weight), rows(name, biases[name])[:, 0]) for name, weight in weights.items()}
