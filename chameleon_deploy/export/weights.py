"""weights.bin: the external data that all graphs of a bundle share.

A tensor is written once, as soon as it is added, and is not held: the export of a large model needs no more memory than
the model itself. The format is ONNX's external data: raw little-endian values at an offset
(https://github.com/onnx/onnx/blob/main/docs/ExternalData.md).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from chameleon_deploy.contract.bundle import FloatArray, StoredTensor
from chameleon_deploy.errors import TensorError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
MADV_PAGEOUT = 21  # a Linux constant that Python's mmap module lacks


class WeightsFile:
    """Append-only writer; use as a context manager so that the file is flushed to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, array: npt.NDArray[Any]) -> ir.ExternalTensor:
        """Write an array, little-endian, and return the tensor that graphs refer to."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        self._file.flush()  # onnx_ir may map the file before it is closed
        return ir.ExternalTensor(
            self.path.name, offset, array.nbytes, ir.DataType.from_numpy(array.dtype), shape=ir.Shape(array.shape),
            name=name, base_dir=self.path.parent,
        )  # fmt: skip

    def add_int4(self, name: str, array: npt.NDArray[np.int8]) -> ir.ExternalTensor:
        """Write values from -8 to 7 in 4 bits, the first of two in the low ones, and return their INT4 tensor."""
        packed = self.add(name, (array[..., ::2] & 15 | array[..., 1::2] << 4).view(np.uint8))
        return _renamed(packed, name, ir.DataType.INT4, array.shape)

    def take(self, graph: ir.Graph) -> None:
        """Copy a graph's tensors from another file into this one, so that the other can be deleted.

        Aliases stay aliases: bytes that two initializers share are copied once.
        """
        copies: dict[int | None, ir.ExternalTensor] = {}
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location == self.path.name:
                continue
            if tensor.offset not in copies:
                copies[tensor.offset] = self.add(str(value.name), tensor.numpy())
            value.const_value = _renamed(copies[tensor.offset], str(value.name))


class GraphWeights:
    """The tensors of a Hugging Face state dict, each written as an initializer of its name when a graph asks for it."""

    def __init__(self, builder: Any, file: WeightsFile, state: Mapping[str, Tensor]) -> None:
        self._builder, self._file, self._state = builder, file, state

    def __call__(self, name: str, offset: float = 0.0, factor: float = 1.0) -> ir.Value:
        """Return (tensor + offset) * factor: by default the tensor unchanged."""
        array: FloatArray = self._state[name].detach().numpy()
        if offset != 0 or factor != 1:
            array = (array + np.float32(offset)) * np.float32(factor)
        value = self.add(name, array)
        page_out(self._state[name])
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def side_by_side(self, name: str, parts: Sequence[str], transposed: bool = False) -> ir.Value:
        """Return linear weights as MatMul takes them, [in, out], concatenated under a name; biases too.

        transposed  whether they are stored like that, and not as [out, in]
        """
        tensors = [self._state[part].detach() for part in parts]
        whole = np.concatenate([tensor.numpy() for tensor in tensors], axis=-1 if transposed else 0)
        value = self.add(name, whole if transposed else whole.T)
        for tensor in tensors:
            page_out(tensor)
        return value

    def add(self, name: str, array: FloatArray) -> ir.Value:
        """Return an array under a new name."""
        value: ir.Value = self._builder.initializer(self._file.add(name, array), name)
        return value


def narrowed(array: FloatArray, dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    """Return an array rounded to a narrower floating-point type. Raises TensorError, with the name of the array, for
    values that the type cannot hold.
    """
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise TensorError(f"{name} holds values that {dtype} cannot: export with --precision bf16 or fp32")
    return rounded


def page_out(tensor: Tensor) -> None:
    """Release the memory of a tensor that is mapped from a file, which is read again when needed.

    A tensor that is not mapped is unchanged. This is a hint: a system without it keeps more memory (madvise(2),
    MADV_PAGEOUT).
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)


def alias(
    value: ir.Value, name: str, dtype: ir.DataType | None = None, shape: Sequence[int] | None = None
) -> ir.ExternalTensor:
    """Give the bytes of an initializer a second name, and if they are told another type and shape."""
    return _renamed(cast(ir.ExternalTensor, value.const_value), name, dtype, shape)


def rows_of(value: ir.Value, name: str, rows: slice) -> ir.ExternalTensor:
    """Give the bytes of some rows of an initializer a new name."""
    tensor = cast(ir.ExternalTensor, value.const_value)
    part = tensor.numpy()[rows]
    offset = (tensor.offset or 0) + rows.start * (tensor.nbytes // tensor.shape.numpy()[0])
    return ir.ExternalTensor(
        tensor.location, offset, part.nbytes, tensor.dtype, shape=ir.Shape(part.shape), name=name,
        base_dir=tensor.base_dir,
    )  # fmt: skip


def _renamed(
    tensor: ir.ExternalTensor, name: str, dtype: ir.DataType | None = None, shape: Sequence[int] | None = None
) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, dtype or tensor.dtype,
        shape=tensor.shape if shape is None else ir.Shape(shape), name=name, base_dir=tensor.base_dir,
    )  # fmt: skip


def stored_tensor(value: ir.Value) -> StoredTensor:
    """Return where an initializer is stored, in the manifest's terms."""
    tensor = cast(ir.ExternalTensor, value.const_value)
    dtype: Any = str(tensor.numpy().dtype)
    return StoredTensor(str(tensor.location), dtype, tuple(tensor.shape.numpy()), int(tensor.offset or 0))
