"""What this machine can do at most, measured: the floor that a benchmark's times stand on.

A virtual machine's ceilings move while it runs: two threads of one read 48 or 84 GB/s, and changed over within
seconds. So they are measured in every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from onnxscript import GraphBuilder

READ_BYTES = 2**30
MATRIX = 2048
ROUNDS = 3


@dataclass(frozen=True)
class Ceilings:
    """The best of several times of reading memory and of a large matrix product.

    bytes_per_second
    operations_per_second  multiplications and additions of float32, in an int8 bundle of unsigned by signed 8 bits;
                           the best of PyTorch and ONNX Runtime, whose kernels differ by a factor of two on some
                           processors
    """

    bytes_per_second: float
    operations_per_second: float
    operations: str  # what was counted: "float32" or "int8"

    def floor(self, num_bytes: float, num_operations: float) -> float:
        """Seconds that no engine can beat which reads these bytes and computes these products."""
        return max(num_bytes / self.bytes_per_second, num_operations / self.operations_per_second)


def open_ceilings(threads: int, precision: str) -> Callable[[], Ceilings]:
    """What measures both ceilings whenever it is called, with `threads` threads, for a bundle of this precision. Half
    precisions have no kernels of their own in ONNX Runtime on a CPU, so float32 is their ceiling."""
    torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4)
    generator = np.random.default_rng(0)
    products: list[Callable[[], object]]
    if precision == "int8":
        left8 = generator.integers(0, 255, (MATRIX, MATRIX), np.uint8)
        right8 = generator.integers(-127, 127, (MATRIX, MATRIX), np.int8)
        session8 = _matmul_session("MatMulInteger", right8, ir.DataType.UINT8, ir.DataType.INT32, threads)
        operations, products = "int8", [lambda: session8.run(None, {"x": left8})]
    else:
        left, right = (generator.random((MATRIX, MATRIX), np.float32) for _ in range(2))
        torch_left, torch_right = torch.from_numpy(left), torch.from_numpy(right)
        session = _matmul_session("MatMul", right, ir.DataType.FLOAT, ir.DataType.FLOAT, threads)
        operations, products = "float32", [lambda: torch_left @ torch_right, lambda: session.run(None, {"x": left})]

    def measure() -> Ceilings:
        reading = READ_BYTES / _best(lambda: values.sum())
        return Ceilings(reading, 2 * MATRIX**3 / min(map(_best, products)), operations)

    return measure


def _matmul_session(
    operator: str, weight: npt.NDArray[Any], left: ir.DataType, product: ir.DataType, threads: int
) -> Any:
    """One product with a constant matrix, which ONNX Runtime repacks when it loads, as it does a model's."""
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
