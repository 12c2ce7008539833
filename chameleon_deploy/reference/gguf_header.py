"""The header of a GGUF file: its key-value pairs, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` reads the same, string by string
through numpy: ten seconds for a vocabulary of 152,000 tokens, which take one second here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chameleon_deploy.errors import CheckpointError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # of the tensors' data, unless `general.alignment` says otherwise
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file.

    shape   as PyTorch has it: the file's dimensions turned round
    type    number of the encoding, see `gguf.GGMLQuantizationType`
    offset  bytes from the beginning of the file
    """

    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


class _Reader:
    """Reads values one after the other. Raises struct.error beyond the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.offset = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        size = self.number("Q")
        if size > len(self._data) - self.offset:
            raise struct.error("a string is longer than the file")
        self.offset += size
        return self._data[self.offset - size : self.offset].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind not in SCALARS:
            return [self.value(kind) for _ in range(count)]
        start, code = self.offset, f"<{count}{SCALARS[kind]}"
        self.offset += struct.calcsize(code)
        return list(struct.unpack_from(code, self._data, start))


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the key-value pairs and the tensors of a file by their names. Raises CheckpointError."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != MAGIC:
                raise CheckpointError(f"cannot read {file}: it is no GGUF file")
            return _read(file, data)
    except (struct.error, KeyError, OverflowError, MemoryError, RecursionError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: its header is damaged: {error}") from error


def _read(file: Path, data: mmap.mmap) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    reader = _Reader(data)
    reader.offset = len(MAGIC)
    version, num_tensors, num_keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in VERSIONS:
        raise CheckpointError(f"cannot read {file}: GGUF version {version}, this release reads {VERSIONS}")
    keys = {}
    for _ in range(num_keys):
        name = reader.text()
        keys[name] = reader.value(reader.number("I"))
    tensors = {}
    for _ in range(num_tensors):
        name = reader.text()
        shape = tuple(reader.number("Q") for _ in range(reader.number("I")))[::-1]
        tensors[name] = StoredTensor(shape, reader.number("I"), reader.number("Q"))
    alignment = keys.get("general.alignment", ALIGNMENT)
    start = -(-reader.offset // alignment) * alignment
    return keys, {name: StoredTensor(t.shape, t.type, start + t.offset) for name, t in tensors.items()}
