"""Adapter files: one low-rank update for bundles of one base model, in safetensors (docs/bundle-format.md).

    <target>.lora_A  float32 [rank, in_features]
    <target>.lora_B  float32 [rank, out_features], the scaling multiplied in

The targets may be some of the bundle's. The file's metadata name the format, the digest of the base model and the
targets, so that a file with missing layers is not taken for an adapter of fewer. Those of an activated adapter name its
`invocation_tokens`: what a text says before them is read without its update.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.contract.manifest import MAX_INVOCATION_TOKENS, AdaptationSpec, factor_names
from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import AdapterError, TensorError

# One set: "<target>.lora_A" [rank, in_features] and "<target>.lora_B" [rank, out_features], by these names.
Factors = Mapping[str, FloatArray]

FORMAT, FORMAT_VERSION = "chameleon-adapter", "1"
MAX_RANK = 1024  # every layer is padded to the largest rank of a call
MAX_HEADER_BYTES = 2**20
PIECE = 2**20  # bytes that are read at once


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class StoredAdapter(NamedTuple):
    """What an adapter file holds.

    factors            float32 [rank, width] for each target of a bundle; zeros where the file has none
    invocation_tokens  of an activated adapter, else none
    digest             SHA-256 of the file
    """

    factors: dict[str, FloatArray]
    invocation_tokens: tuple[int, ...]
    digest: str


def max_rank(spec: AdaptationSpec) -> int:
    """Return the largest rank of an adapter, or of several that a row blends."""
    return spec.rank if spec.regime == "base" else MAX_RANK


def check_rank(file: Path, rank: int, spec: AdaptationSpec) -> None:
    """Raise TensorError unless a bundle takes adapters of this rank."""
    if not 1 <= rank <= MAX_RANK:
        raise TensorError(f"{file}: rank {rank}: it must be from 1 to {MAX_RANK}")
    if rank > max_rank(spec):
        raise TensorError(f"{file}: rank {rank}: this bundle was exported with --max-rank {spec.rank}")


def most_bytes(spec: AdaptationSpec) -> int:
    """Return the size that no adapter file of a bundle exceeds."""
    return MAX_HEADER_BYTES + 4 * MAX_RANK * sum(spec.factor_widths.values())


def write_adapter(file: Path, factors: Factors, spec: AdaptationSpec, invocation_tokens: Sequence[int] = ()) -> None:
    """Write the factors of an adapter for bundles of the same base. Raises OutputError."""
    targets = [target.name for target in spec.targets if factor_names(target.name)[0] in factors]
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_digest": spec.base_digest,
        "targets": json.dumps(targets),
    }
    if invocation_tokens:
        metadata["invocation_tokens"] = json.dumps(list(invocation_tokens))
    tensors = {name: np.ascontiguousarray(array) for name, array in factors.items()}
    write_whole(file, lambda partial: save_file(tensors, partial, metadata))


def read_adapter(file: Path, spec: AdaptationSpec) -> StoredAdapter:
    """Read an adapter.

    Raises AdapterError for a file that is not an adapter of this bundle, TensorError for tensors that do not fit.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as pool:  # the digest takes longer than everything else
        raw = _read_whole(file, spec, lambda piece: pool.submit(digest.update, piece))
        factors, invocation_tokens = _parse(raw, file, spec)
    return StoredAdapter(factors, invocation_tokens, digest.hexdigest())


def invocation_fault(tokens: Any) -> str | None:
    """Return what is wrong with the invocation tokens of an adapter, or None: there are some, and they are token ids.

    Whether a model has these tokens is not checked.
    """
    if not isinstance(tokens, list | tuple) or not 1 <= len(tokens) <= MAX_INVOCATION_TOKENS:
        return f"must be a list of 1 to {MAX_INVOCATION_TOKENS} token ids"
    wrong = next((token for token in tokens if type(token) is not int or not 0 <= token < 2**31), None)
    return None if wrong is None else f"hold {wrong!r:.40}, which is no token id"


def _read_whole(file: Path, spec: AdaptationSpec, follow: Callable[[memoryview], object]) -> npt.NDArray[np.uint8]:
    """Return the bytes of a file that may be an adapter. Raises AdapterError for what is no plain file of its size.

    follow  called for each piece that has been read
    """
    most = most_bytes(spec)
    try:
        if not file.is_file() or file.is_symlink():
            raise AdapterError(f"{file} is not a plain file: pass a file that export wrote")
        with file.open("rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > most:
                raise AdapterError(f"{file}: not an adapter file of this bundle: it has more than {most} bytes")
            raw = np.empty(size, np.uint8)  # not bytes: large arrays have large pages
            view, start = raw.data, 0
            while count := opened.readinto(view[start : start + PIECE]):
                follow(view[start : start + count])
                start += count
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}") from error
    return raw[:start]


def _parse(
    raw: npt.NDArray[np.uint8], file: Path, spec: AdaptationSpec
) -> tuple[dict[str, FloatArray], tuple[int, ...]]:
    try:
        with safe_open(file, "numpy"):  # which checks the header, also against the size
            pass
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = msgspec.json.decode(raw[8:begin].tobytes(), type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(header.pop("__metadata__", b"{}"), type=dict[str, str])
        stored = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
        _check_metadata(file, metadata, spec, set(stored))
        invocation_tokens = _invocation_tokens(file, metadata)
        rank = _check_tensors(file, stored, spec)
        tensors = {name: _tensor(raw[begin:], entry) for name, entry in stored.items()}
    except (SafetensorError, OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise AdapterError(f"{file}: not an adapter file: {error}") from error
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise TensorError(f"{file}: {name} holds NaN or infinity")
    factors = {
        name: tensors[name] if name in tensors else np.zeros((rank, width), np.float32)
        for name, width in spec.factor_widths.items()
    }
    return factors, invocation_tokens


def _tensor(data: npt.NDArray[np.uint8], entry: _Entry) -> FloatArray:
    """Return a tensor without a copy, unless it lies where no float32 may. Raises ValueError for other sizes."""
    begin, end = entry.data_offsets
    return np.require(np.frombuffer(data[begin:end], "<f4").reshape(entry.shape), requirements="A")


def _invocation_tokens(file: Path, metadata: Mapping[str, str]) -> tuple[int, ...]:
    """Return the invocation tokens that the metadata name, or none. Raises AdapterError."""
    if "invocation_tokens" not in metadata:
        return ()
    tokens = json.loads(metadata["invocation_tokens"])
    if fault := invocation_fault(tokens):
        raise AdapterError(f"{file}: its invocation_tokens {fault}")
    return tuple(tokens)


def _check_metadata(file: Path, metadata: Mapping[str, str], spec: AdaptationSpec, names: set[str]) -> None:
    """Check where an adapter comes from. Raises AdapterError or TensorError."""
    if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        raise AdapterError(f"{file}: not an adapter file of version {FORMAT_VERSION}: export the adapter again")
    if not spec.base_digest:
        raise AdapterError(f"{file}: this bundle takes no adapters: export its base model, with --adaptable LAYERS")
    if metadata.get("base_digest") != spec.base_digest:
        raise AdapterError(f"{file}: it is for another base model than this bundle's: export it for this bundle")
    targets: Any = json.loads(metadata.get("targets", "null"))
    known = [target.name for target in spec.targets]
    if not isinstance(targets, list) or not targets:
        raise AdapterError(f"{file}: its metadata name no targets")
    if unknown := [target for target in targets if target not in known]:
        raise AdapterError(
            f"{file}: adapts {str(unknown[0])[:80]!r}, which this bundle does not: export it with --adaptable LAYERS "
            "or with this adapter"
        )
    expected = {name for target in targets for name in factor_names(target)}
    if names != expected:
        raise TensorError(f"{file}: its tensors and its targets differ at {sorted(names ^ expected)[0]!r}")


def _check_tensors(file: Path, stored: Mapping[str, _Entry], spec: AdaptationSpec) -> int:
    """Check dtypes and shapes, and return the rank of all tensors. Raises TensorError."""
    rank = next((entry.shape[0] for entry in stored.values() if entry.shape), 0)
    check_rank(file, rank, spec)
    widths = spec.factor_widths
    for name, entry in stored.items():
        expected = (rank, widths[name])
        if entry.dtype != "F32" or entry.shape != expected:
            raise TensorError(f"{file}: {name} is {entry.dtype} {entry.shape}, expected F32 {expected}")
    return rank
