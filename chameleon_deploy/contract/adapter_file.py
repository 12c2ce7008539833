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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.contract.manifest import MAX_INVOCATION_TOKENS, AdaptationSpec, factor_names
from chameleon_deploy.contract.safetensors_file import StoredTensor, read_safetensors
from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import AdapterError, TensorError

# One set: "<target>.lora_A" [rank, in_features] and "<target>.lora_B" [rank, out_features], by these names.
Factors = Mapping[str, FloatArray]

FORMAT, FORMAT_VERSION = "chameleon-adapter", "1"
MAX_RANK = 1024  # every layer is padded to the largest rank of a call
MAX_HEADER_BYTES = 2**20


class StoredAdapter(NamedTuple):
    """What an adapter file holds.

    factors            float32 [rank, width] for each target of a bundle; zeros where the file has none
    updating           the layers whose factors are not zero
    invocation_tokens  of an activated adapter, else none
    digest             SHA-256 of the file
    """

    factors: dict[str, FloatArray]
    updating: tuple[str, ...]
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
    try:
        if not file.is_file() or file.is_symlink():
            raise AdapterError(f"{file} is not a plain file: pass a file that export wrote")
        with ThreadPoolExecutor(1) as pool:  # the digest takes longer than everything else
            stored = read_safetensors(file, most_bytes(spec), lambda piece: pool.submit(digest.update, piece))
            _check_metadata(file, stored.metadata, spec, set(stored.tensors))
            invocation_tokens = _invocation_tokens(file, stored.metadata)
            factors, updating = _factors(file, stored.tensors, spec)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not an adapter file: {error}") from error
    return StoredAdapter(factors, updating, invocation_tokens, digest.hexdigest())


def invocation_fault(tokens: Any) -> str | None:
    """Return what is wrong with the invocation tokens of an adapter, or None: there are some, and they are token ids.

    Whether a model has these tokens is not checked.
    """
    if not isinstance(tokens, list | tuple) or not 1 <= len(tokens) <= MAX_INVOCATION_TOKENS:
        return f"must be a list of 1 to {MAX_INVOCATION_TOKENS} token ids"
    wrong = next((token for token in tokens if type(token) is not int or not 0 <= token < 2**31), None)
    return None if wrong is None else f"hold {wrong!r:.40}, which is no token id"


def _factors(
    file: Path, tensors: Mapping[str, StoredTensor], spec: AdaptationSpec
) -> tuple[dict[str, FloatArray], tuple[str, ...]]:
    """Return the factors, and the layers that these update. Raises TensorError."""
    rank = _check_tensors(file, tensors, spec)
    factors, updating = {}, []
    for target in spec.targets:
        for name, width in zip(factor_names(target.name), (target.in_features, target.out_features), strict=True):
            factors[name] = tensors[name].array() if name in tensors else np.zeros((rank, width), np.float32)
            least, most = factors[name].min(), factors[name].max()  # half the time of isfinite, which writes an array
            if not (np.isfinite(least) and np.isfinite(most)):
                raise TensorError(f"{file}: {name} holds NaN or infinity")
        if least or most:  # of lora_B
            updating.append(target.name)
    return factors, tuple(updating)


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


def _check_tensors(file: Path, stored: Mapping[str, StoredTensor], spec: AdaptationSpec) -> int:
    """Check dtypes and shapes, and return the rank of all tensors. Raises TensorError."""
    rank = next((entry.shape[0] for entry in stored.values() if entry.shape), 0)
    check_rank(file, rank, spec)
    widths = spec.factor_widths
    for name, entry in stored.items():
        expected = (rank, widths[name])
        if entry.dtype != "F32" or entry.shape != expected:
            raise TensorError(f"{file}: {name} is {entry.dtype} {entry.shape}, expected F32 {expected}")
    return rank
