"""Memory of a GPU, copies and one stream, through cuda-python. Every byte copied to or from the device is counted.

Names and meanings are those of NVIDIA's runtime API (https://docs.nvidia.com/cuda/cuda-runtime-api/). All work is
enqueued on one stream and runs in that order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chameleon_deploy.errors import DependencyError, DeviceError, ProviderError
from chameleon_deploy.runtime.device.engines import require_driver

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int32": 4, "int64": 8}  # bytes


def import_cudart() -> Any:
    """Return cuda-python's runtime API on a machine that has a GPU.

    Raises ProviderError without a driver or a GPU, DependencyError without cuda-python.
    """
    require_driver()
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        raise DependencyError("cuda-python is not installed: pip install 'chameleon-deploy[gpu]'") from error
    status, count = cudart.cudaGetDeviceCount()
    if int(status) or not count:
        raise ProviderError(
            f"the NVIDIA driver gives no GPU ({_name(status)}): check nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    return cudart


class CudaDevice:
    """The first visible GPU. Hold `lock` while enqueuing work that must not be interleaved.

    uploaded, downloaded  bytes copied to and from the device
    """

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._released: list[Callable[[], object]] = []
        self.lock = threading.RLock()
        self.uploaded = self.downloaded = 0
        self.stream = int(self._call("cudaStreamCreate"))

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Allocate uninitialised memory. Raises DeviceError when the memory is exhausted."""
        size = math.prod(shape) * ITEM_SIZES[dtype]
        with self.lock:
            # Freeing waits for the device and is not allowed during a graph capture, so it is postponed until here.
            while self._released:
                self._released.pop()()
            # an engine takes no null pointer, even for an empty tensor
            address = int(self._call("cudaMalloc", max(size, 1)))
        return DeviceArray(self, address, shape, dtype, _Memory(self, lambda: self._call("cudaFree", address)))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        array = self.empty(shape, dtype)
        self._call("cudaMemsetAsync", array.address, 0, array.nbytes, self.stream)
        return array

    def upload(self, values: npt.NDArray[Any], dtype: str) -> DeviceArray:
        """Copy host values to new device memory, converted to `dtype`."""
        array = self.empty(values.shape, dtype)
        self.write(array, values)
        return array

    def write(self, array: DeviceArray, values: npt.NDArray[Any]) -> None:
        """Copy host values into existing device memory. They are read before this returns."""
        stored = np.ascontiguousarray(_stored(values, array.dtype))
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        with self.lock:
            self._call("cudaMemcpyAsync", array.address, stored.ctypes.data, stored.nbytes, kind, self.stream)
            self.uploaded += stored.nbytes

    def read(self, array: DeviceArray) -> npt.NDArray[Any]:
        """Copy values to the host after waiting for the stream. bfloat16, which numpy lacks, becomes float32."""
        values = np.empty(array.shape, np.uint16 if array.dtype == "bfloat16" else array.dtype)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        with self.lock:
            self._call("cudaMemcpyAsync", values.ctypes.data, array.address, values.nbytes, kind, self.stream)
            self.downloaded += values.nbytes
            self.synchronize()
        return (values.astype(np.uint32) << 16).view(np.float32) if array.dtype == "bfloat16" else values

    def copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """Copy `height` runs of `width` bytes from address `source` to `target`; the pitches are the strides in
        bytes.
        """
        if not width or not height:
            return
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(
            "cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, height, kind, self.stream
        )  # fmt: skip

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work that `work` enqueues as a CUDA graph.  -> a function that enqueues it all again, in one call

        Raises DeviceError if part of it cannot be recorded.
        """
        self._call(
            "cudaStreamBeginCapture", self.stream, self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", self.stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        memory = _Memory(self, lambda: self._call("cudaGraphExecDestroy", executable))

        def launch(_memory: _Memory = memory) -> None:  # the graph lives as long as this function
            self._call("cudaGraphLaunch", executable, self.stream)

        return launch

    def release(self, free: Callable[[], object]) -> None:
        """Postpone a call that frees something until it is safe."""
        self._released.append(free)

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *values = getattr(self._cudart, function)(*arguments)
        if int(status):
            raise DeviceError(f"{function}: {_name(status)}: see nvidia-smi for what else uses the GPU")
        return values[0] if values else None


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """Values on the device: an address with a shape. numpy.asarray copies them to the host."""

    device: CudaDevice
    address: int
    shape: tuple[int, ...]
    dtype: str
    memory: _Memory

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def __len__(self) -> int:
        return self.shape[0]

    def view(self, shape: tuple[int, ...], offset: int = 0) -> DeviceArray:
        """Return other dimensions of the same memory, from an offset in bytes."""
        return DeviceArray(self.device, self.address + offset, shape, self.dtype, self.memory)

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> DeviceArray:
        """Copy entries along the first axis, in the order of the indices, on the device."""
        if np.array_equal(indices, np.arange(len(self))):
            return self
        chosen = self.device.empty((len(indices), *self.shape[1:]), self.dtype)
        size = self.nbytes // len(self)
        with self.device.lock:
            for i, index in enumerate(indices.tolist()):
                self.device.copy(chosen.address + i * size, size, self.address + index * size, size, size, 1)
        return chosen

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self.device.read(self)
        return values if dtype is None else values.astype(dtype, copy=False)


class _Memory:
    """A device allocation that is freed with its last reference."""

    def __init__(self, device: CudaDevice, free: Callable[[], object]) -> None:
        self._device, self._free = device, free

    def __del__(self) -> None:
        self._device.release(self._free)


def _stored(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype != "bfloat16":
        return values.astype(dtype, copy=False)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to nearest, ties to even


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))
