"""Adapter files: one low-rank update for bundles of one base model, in safetensors (docs/bundle-format.md).

    <target>.lora_A  float32 [rank, in_features]
    <target>.lora_B  float32 [rank, out_features], the scaling multiplied in

The targets may be some of the bundle's. The file's metadata name the format, the digest of the base model and the
targets, so that a file with missing layers is not taken for an adapter of fewer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.contract.manifest import AdaptationSpec, factor_names
from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import AdapterError, TensorError

FORMAT, FORMAT_VERSION = "chameleon-adapter", "1"
MAX_RANK = 1024  # every layer is padded to the largest rank of a call


def write_adapter(file: Path, factors: Mapping[str, FloatArray], spec: AdaptationSpec) -> None:
    """Write the factors of an adapter for bundles of the same base. Raises OutputError."""
    targets = [target.name for target in spec.targets if factor_names(target.name)[0] in factors]
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_digest": spec.base_digest,
        "targets": json.dumps(targets),
    }
    tensors = {name: np.ascontiguousarray(array) for name, array in factors.items()}
    write_whole(file, lambda partial: save_file(tensors, partial, metadata))


def read_adapter(file: Path, spec: AdaptationSpec) -> dict[str, FloatArray]:
    """Return the factors of an adapter, float32 [rank, width] for each target of a bundle; zeros where it has none.

    Raises AdapterError for a file that is not an adapter of this bundle, TensorError for tensors that do not fit.
    """
    if not file.is_file() or file.is_symlink():
        raise AdapterError(f"{file} is not a plain file: pass a file that export wrote")
    try:
        with safe_open(file, "numpy") as opened:
            _check_metadata(file, opened.metadata() or {}, spec, set(opened.keys()))
            rank = _check_tensors(file, {name: opened.get_slice(name) for name in opened.keys()}, spec)  # noqa: SIM118
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not an adapter file: {error}") from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise TensorError(f"{file}: {name} holds NaN or infinity")
    return {
        name: tensors[name] if name in tensors else np.zeros((rank, width), np.float32)
        for name, width in spec.factor_widths.items()
    }


def _check_metadata(file: Path, metadata: Mapping[str, str], spec: AdaptationSpec, names: set[str]) -> None:
    """Check where an adapter comes from. Raises AdapterError or TensorError."""
    if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        raise AdapterError(f"{file}: not an adapter file of version {FORMAT_VERSION}: export the adapter again")
    if not spec.base_digest:
        raise AdapterError(f"{file}: this bundle was exported without adapters: export it with --adapter")
    if metadata.get("base_digest") != spec.base_digest:
        raise AdapterError(f"{file}: it is for another base model than this bundle's: export it for this bundle")
    targets: Any = json.loads(metadata.get("targets", "null"))
    known = [target.name for target in spec.targets]
    if not isinstance(targets, list) or not targets:
        raise AdapterError(f"{file}: its metadata name no targets")
    if unknown := [target for target in targets if target not in known]:
        raise AdapterError(
            f"{file}: adapts {str(unknown[0])[:80]!r}, which this bundle does not: export the bundle with this adapter"
        )
    expected = {name for target in targets for name in factor_names(target)}
    if names != expected:
        raise TensorError(f"{file}: its tensors and its targets differ at {sorted(names ^ expected)[0]!r}")


def _check_tensors(file: Path, slices: Mapping[str, Any], spec: AdaptationSpec) -> int:
    """Check dtypes and shapes before anything is read, and return the rank of all tensors. Raises TensorError."""
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    rank = next((shape[0] for shape in shapes.values() if shape), 0)
    if not 1 <= rank <= MAX_RANK:
        raise TensorError(f"{file}: rank {rank}: it must be from 1 to {MAX_RANK}")
    for name, shape in shapes.items():
        if slices[name].get_dtype() != "F32" or shape != (rank, spec.factor_widths[name]):
            expected = f"F32 {(rank, spec.factor_widths[name])}"
            raise TensorError(f"{file}: {name} is {slices[name].get_dtype()} {shape}, expected {expected}")
    return rank
