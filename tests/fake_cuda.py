"""cuda-python's runtime API over the memory of this machine, for tests of the code that drives a GPU.

It skips no logic: memory is allocated, copied and freed for real, and the fake is stricter than a GPU. Fresh memory
holds NaNs; an access outside of an allocation, after its end or at an address that is not aligned fails; a graph can
be launched only while nothing that it recorded has been changed.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime


class _Status(int):
    name: str

    def __new__(cls, value: int, name: str) -> _Status:
        status = super().__new__(cls, value)
        status.name = name
        return status


SUCCESS, INVALID = _Status(0, "cudaSuccess"), _Status(1, "cudaErrorInvalidValue")
NO_MEMORY = _Status(2, "cudaErrorMemoryAllocation")


class FakeCudart:
    """capacity: bytes that it has to give."""

    cudaMemcpyKind = Enum(
        "cudaMemcpyKind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"]
    )
    cudaStreamCaptureMode = Enum("cudaStreamCaptureMode", ["cudaStreamCaptureModeThreadLocal"])

    def __init__(self, capacity: int = 2**32) -> None:
        self.capacity = capacity
        self.blocks: dict[int, tuple[Any, int]] = {}  # address -> what owns the memory, and its size
        self.recording: list[Callable[[], bool]] | None = None
        self.launched = 0

    @property
    def used(self) -> int:
        return sum(size for _, size in self.blocks.values())

    def inside(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + length for start, (_, length) in self.blocks.items())

    def cudaMalloc(self, size: int) -> tuple[Any, int]:
        if self.recording is not None or self.used + size > self.capacity:
            return NO_MEMORY, 0
        owner = np.full(size + 256, 0xFF, np.uint8)  # NaN as float32 or float16, -1 as an integer
        address = -(-owner.ctypes.data // 256) * 256
        self.blocks[address] = (owner, size)
        return SUCCESS, address

    def cudaFree(self, address: int) -> tuple[Any]:
        if self.recording is not None or self.blocks.pop(address, None) is None:
            return (INVALID,)
        return (SUCCESS,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any]:
        on_device = source if kind.name == "cudaMemcpyDeviceToHost" else target
        if self.recording is not None or not self.inside(on_device, size):
            return (INVALID,)
        ctypes.memmove(target, source, size)
        return (SUCCESS,)

    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: Any,
        stream: int,
    ) -> tuple[Any]:  # fmt: skip
        sizes = {target: (height - 1) * target_pitch + width, source: (height - 1) * source_pitch + width}
        fits = all(self.inside(address, size) for address, size in sizes.items())
        if self.recording is not None or not fits or width > min(target_pitch, source_pitch):
            return (INVALID,)
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
        return (SUCCESS,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        if self.recording is not None or not self.inside(address, size):
            return (INVALID,)
        ctypes.memset(address, value, size)
        return (SUCCESS,)

    def cudaStreamCreate(self) -> tuple[Any, int]:
        return SUCCESS, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        return (SUCCESS if self.recording is None else INVALID,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        self.recording = []
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, Any]:
        recorded, self.recording = self.recording, None
        return SUCCESS, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        return (SUCCESS, list(graph)) if graph else (INVALID, None)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any]:
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Any]:
        executable.clear()
        return (SUCCESS,)

    def cudaGraphLaunch(self, executable: Any, stream: int) -> tuple[Any]:
        self.launched += 1
        return (SUCCESS if executable and all(work() for work in executable) else INVALID,)


class FakeEngine:
    """TensorRT's ICudaEngine and IExecutionContext over an ONNX graph, which ONNX Runtime executes at the addresses.

    profiles: of each, the least, best and largest shape of every input
    """

    def __init__(
        self, onnx_file: Path, profiles: Sequence[Mapping[str, Sequence[tuple[int, ...]]]], cudart: FakeCudart
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self.profiles, self.cudart = profiles, cudart
        self.contexts: list[FakeContext] = []
        self.num_optimization_profiles, self.num_io_tensors = len(profiles), len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return str([*self.inputs, *self.outputs][index])

    def get_tensor_profile_shape(self, name: str, profile: int) -> Sequence[tuple[int, ...]]:
        return self.profiles[profile][name]

    def create_execution_context(self, strategy: str) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.version = 0  # of shapes and addresses: what a recorded graph depends on
        self.prepared = -1  # the version that has been run

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile][name]
        self.shapes[name], self.version = shape, self.version + 1
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name], self.version = address, self.version + 1
        return address % 256 == 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        symbols: dict[str, int] = {}
        for node in self.engine.inputs.values():
            symbols |= {d: n for d, n in zip(node.shape, self.shapes[node.name], strict=True) if isinstance(d, str)}
        return tuple(symbols[d] if isinstance(d, str) else d for d in self.engine.outputs[name].shape)

    def execute_async_v3(self, stream: int) -> bool:
        recording = self.engine.cudart.recording
        if recording is None:
            self.prepared = self.version
            return self._execute(self.version)
        if self.prepared != self.version:
            return False  # TensorRT still has to prepare itself for these shapes, which cannot be recorded
        recording.append(partial(self._execute, self.version))
        return True

    def _execute(self, version: int) -> bool:
        if version != self.version:
            return False
        binding = self.engine.session.io_binding()
        for name, node in self.engine.inputs.items():
            binding.bind_input(name, "cpu", 0, TYPES[node.type], self.shapes[name], self.addresses[name])
        for name, node in self.engine.outputs.items():
            shape = self.get_tensor_shape(name)
            if not self.engine.cudart.inside(
                self.addresses[name], math.prod(shape) * np.dtype(TYPES[node.type]).itemsize
            ):
                return False
            binding.bind_output(name, "cpu", 0, TYPES[node.type], shape, self.addresses[name])
        self.engine.session.run_with_iobinding(binding)
        return True


TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}

FAKE_TENSORRT = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(ON_PROFILE_CHANGE="its own"))
