"""Safetensors files read into one block of memory: their header, and their tensors as parts of that block.

A process that reads many files for a long time keeps the holes between small blocks, which several threads made and
freed; a large block goes back to the system.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from chameleon_deploy.contract.bundle import FloatArray

PIECE = 2**20  # bytes that are read at once
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}  # safetensors' names, and the bytes of each

FLOAT_DTYPES = tuple(_DTYPES)


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    dtype  safetensors' name of it
    data   uint8, its part of the file
    """

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def array(self) -> FloatArray:
        """Return the values: a float16, float32 or float64 view where alignment allows; bfloat16 as float32.

        `dtype` must be one of FLOAT_DTYPES. Raises ValueError for data of another size than the shape says.
        """
        array = np.frombuffer(self.data, _DTYPES[self.dtype]).reshape(self.shape)
        if self.dtype == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return np.require(array, requirements="A")


class Safetensors(NamedTuple):
    """What a file holds: its metadata, and its tensors by name, sorted."""

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


def read_safetensors(file: Path, most: int, follow: Callable[[memoryview], object] | None = None) -> Safetensors:
    """Read a file of at most so many bytes.

    follow  called for each piece of the file that has been read, in order

    Raises OSError, and ValueError for what is no such file.
    """
    raw = _read_whole(file, most, follow)
    try:
        with safe_open(file, "numpy"):  # which checks the header, also against the size
            pass
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = msgspec.json.decode(raw[8:begin].tobytes(), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(header[name], type=_Entry) for name in sorted(header)}
    except (SafetensorError, msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from error
    data = raw[begin:]
    return Safetensors(
        metadata,
        {name: StoredTensor(e.dtype, e.shape, data[slice(*e.data_offsets)]) for name, e in entries.items()},
    )


def _read_whole(file: Path, most: int, follow: Callable[[memoryview], object] | None) -> npt.NDArray[np.uint8]:
    with file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > most:
            raise ValueError(f"it has more than {most} bytes")
        raw = np.empty(size, np.uint8)  # not bytes: large arrays have large pages
        view, start = raw.data, 0
        while count := opened.readinto(view[start : start + PIECE]):
            if follow is not None:
                follow(view[start : start + count])
            start += count
    return raw[:start]
