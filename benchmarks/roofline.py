"""The roofline of a benchmark: how near each time of the bundle is to what the machine can do at most.

    python -m benchmarks.roofline BUNDLE bench.json
    python -m benchmarks.roofline BUNDLE gpu.json

Prints for every timing the share of the least time: that in which the weights are read once per pass, or the matrix
products are computed, whichever is longer. Attention scores are left out: at these lengths they are a few percent.

For `bench --json` this measures the bandwidth of reading memory and the rate of a large matrix product. The bandwidth
of a virtual machine moves, on some by a factor of two within seconds, so shares over 100 % are possible. For
`gpu-check --json` it takes the bandwidth that was measured there, and counts reading alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
import typer
from onnxscript import GraphBuilder

from chameleon_deploy.contract.bundle import Bundle, open_bundle
from chameleon_deploy.runtime.device.cuda import ITEM_SIZES
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

READ_BYTES = 2**30
MATRIX = 2048
ROUNDS = 9


@dataclass(frozen=True)
class Roofline:
    """The best of several measurements: bytes read, and multiplications and additions, per second."""

    bytes_per_second: float
    operations_per_second: float

    def least_seconds(self, num_bytes: float, num_operations: float) -> float:
        return max(num_bytes / self.bytes_per_second, num_operations / self.operations_per_second)


def measure_roofline(threads: int, precision: str) -> Roofline:
    """The roofline of `threads` threads for a bundle of this precision.

    Products are of unsigned by signed 8 bits for int8, otherwise of float32, since ONNX Runtime has no half-precision
    kernels on a CPU: the best of PyTorch and ONNX Runtime, whose kernels differ by a factor of two on some processors.
    """
    torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4)
    generator = np.random.default_rng(0)
    products: list[Callable[[], object]]
    if precision == "int8":
        left8 = generator.integers(0, 255, (MATRIX, MATRIX), np.uint8)
        right8 = generator.integers(-127, 127, (MATRIX, MATRIX), np.int8)
        session8 = _matmul_session("MatMulInteger", right8, ir.DataType.UINT8, ir.DataType.INT32, threads)
        products = [lambda: session8.run(None, {"x": left8})]
    else:
        left, right = (generator.random((MATRIX, MATRIX), np.float32) for _ in range(2))
        torch_left, torch_right = torch.from_numpy(left), torch.from_numpy(right)
        session = _matmul_session("MatMul", right, ir.DataType.FLOAT, ir.DataType.FLOAT, threads)
        products = [lambda: torch_left @ torch_right, lambda: session.run(None, {"x": left})]
    return Roofline(READ_BYTES / _best(values.sum), 2 * MATRIX**3 / min(map(_best, products)))


def _matmul_session(
    operator: str, weight: npt.NDArray[Any], left: ir.DataType, product: ir.DataType, threads: int
) -> Any:
    """One product with a constant matrix, which ONNX Runtime packs when it loads, as it does a model's."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="matmul")
    builder = GraphBuilder(graph)
    x = builder.input("x", left, list(weight.shape))
    matrix = builder.initializer(ir.tensor(weight, name="weight"))
    builder.add_output(getattr(builder.op, operator)(x, matrix), "y")
    graph.outputs[0].type, graph.outputs[0].shape = ir.TensorType(product), ir.Shape(weight.shape)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Weights:
    """The matrices that a decoder graph multiplies by.

    bytes         of all of them
    of_tokens     numbers in those that every token is multiplied by
    of_positions  numbers in those behind the last attention, by which only positions with logits are multiplied
    cache_bytes   of one token in the cache
    """

    def __init__(self, bundle: Bundle, graph_name: str) -> None:
        model, spec = bundle.manifest.model, bundle.manifest.graphs[graph_name]
        cached = next(tensor for tensor in spec.inputs if tensor.name.startswith("past_key_values."))
        self.cache_bytes = ITEM_SIZES[cached.dtype] * 2 * model.num_layers * model.num_key_value_heads * model.head_dim
        self.bytes = self.of_tokens = self.of_positions = 0
        graph = ir.load(bundle.path / spec.file).graph
        chosen = {value for value in graph.inputs if value.name == "logits_positions"}  # and what depends on them
        for node in graph:
            if chosen.intersection(node.inputs):
                chosen.update(node.outputs)
        for value in graph.initializers.values():
            matrix, takers = value.const_value, list(value.consumers())
            if all(node.op_type == "DequantizeLinear" for node in takers):
                takers = [taker for node in takers for taker in node.outputs[0].consumers()]
            if matrix is None or len(matrix.shape) < 2 or all(node.op_type == "Gather" for node in takers):
                continue  # norms and biases are small, and of an embedding only the rows looked up are read
            self.bytes += matrix.nbytes
            if all(chosen.intersection(node.inputs) for node in takers):
                self.of_positions += matrix.size
            else:
                self.of_tokens += matrix.size

    def work(self, tokens: int, positions: int, passes: int = 1, cached: int = 0) -> tuple[float, float]:
        """Bytes to read and operations to compute, for a number of tokens, of positions with logits, of passes over the
        weights, and of tokens read from the cache."""
        operations = 2 * (self.of_tokens * tokens + self.of_positions * positions)
        return passes * self.bytes + cached * self.cache_bytes, operations

    def work_of(self, part: dict[str, Any]) -> tuple[float, float] | None:
        """The work of a part of `bench --json`; None for adaptation, which does not run the decoder."""
        batch, width, steps = part["batch"], part["width"], part["new_tokens"] - 1
        scoring = self.work(batch * width, batch * width)
        prefill = self.work(batch * width, batch)
        decode = self.work(steps * batch, steps * batch, passes=steps, cached=steps * batch * width)
        generation = prefill[0] + decode[0], prefill[1] + decode[1]
        return {
            "scoring": scoring, "first_token": prefill, "prefill": prefill, "decode": decode, "generation": generation,
        }.get(part["kind"])  # fmt: skip


def share_sheet(weights: Weights, timings: list[dict[str, Any]], roofline: Roofline) -> Sheet:
    """The share of the least time in each of the bundle's times."""
    rows = []
    for timing in timings:
        if (work := weights.work_of(timing["part"])) is not None:
            seconds, least = timing["seconds"][timing["baseline"]], roofline.least_seconds(*work)
            rows.append(
                [timing["part"]["name"], f"{1e3 * least:.3f}", f"{1e3 * seconds:.3f}", f"{least / seconds:.0%}"]
            )
    caption = f"{roofline.bytes_per_second / 1e9:.1f} GB/s, {roofline.operations_per_second / 1e9:.0f} G operations/s"
    return Sheet(["", "least ms", "ms", "share"], rows, caption=caption)


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    file: Annotated[Path, typer.Argument(help="What `bench --json` or `gpu-check --json` wrote on this machine.")],
) -> None:
    """Compare the times of a benchmark with the machine's roofline."""
    opened, record = open_bundle(bundle), json.loads(file.read_text())
    if "bundles" in record:
        record = next(found for found in record["bundles"] if Path(found["bundle"]).samefile(bundle))
        graph, roofline = opened.graph("decoder", "cuda"), Roofline(record["bytes_per_second"], math.inf)
    else:
        graph, roofline = opened.graph("decoder", "cpu"), measure_roofline(record["threads"], record["precision"])
    console.show(share_sheet(Weights(opened, graph), record["timings"], roofline))


if __name__ == "__main__":
    console.run(main)
