"""What this machine can do at most, measured: the floor that a benchmark's times stand on."""

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
ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_second of reading memory, flops_per_second of a float32 matrix product: the best of several rounds,
    and of PyTorch and ONNX Runtime, whose kernels differ by a factor of two on some processors."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, num_bytes: float, num_flops: float) -> float:
        """Seconds that no engine can beat which reads these bytes and computes these products."""
        return max(num_bytes / self.bytes_per_second, num_flops / self.flops_per_second)


def measure_ceilings(threads: int) -> Ceilings:
    """Both ceilings with `threads` threads."""
    torch.set_num_threads(threads)
    values = torch.ones(READ_BYTES // 4)
    left, right = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX)
    session, fed = _matmul_session(right.numpy(), threads), {"x": left.numpy()}
    product = min(_best(lambda: left @ right), _best(lambda: session.run(None, fed)))
    return Ceilings(READ_BYTES / _best(lambda: values.sum()), 2 * MATRIX**3 / product)


def _matmul_session(weight: npt.NDArray[np.float32], threads: int) -> Any:
    """One product with a constant matrix, which ONNX Runtime repacks when it loads, as it does a model's."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="matmul")
    builder = GraphBuilder(graph)
    x = builder.input("x", ir.DataType.FLOAT, list(weight.shape))
    builder.add_output(builder.op.MatMul(x, builder.initializer(ir.tensor(weight, name="weight"))), "y")
    graph.outputs[0].type, graph.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(weight.shape)
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
