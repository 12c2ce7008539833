"""The artifact contract between export and the runtimes (docs/design.md section 5).

A bundle is a flat directory of plain files. `bundle.json` lists every other file with its size and SHA-256, every graph
with its inputs and outputs, and the model's dimensions. `open_bundle` refuses whatever it does not know: a bundle that
opens is a bundle that runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from chameleon_deploy.contract.manifest import (
    FORMAT,
    FORMAT_VERSION,
    HEAD,
    HEAD_BALANCE,
    INTEGERS,
    LM_HEAD,
    MANIFEST,
    AdaptationSpec,
    FileSpec,
    GraphSpec,
    LimitsSpec,
    Manifest,
    Mode,
    ModelSpec,
    Parameters,
    ParitySummary,
    Precision,
    Protocol,
    Regime,
    Role,
    StoredTensor,
    TargetSpec,
    TensorSpec,
    TrainedRegime,
    available_modes,
    basis_names,
    default_mode,
    factor_names,
    int8_names,
    limits_fault,
    parse_manifest,
)
from chameleon_deploy.contract.onnx_operators import check_graph_file
from chameleon_deploy.contract.provenance import SIGNATURE, TrustedKeys, check_signature
from chameleon_deploy.contract.signature import check_graphs
from chameleon_deploy.contract.token_embedding import Int8Rows, TokenEmbedding
from chameleon_deploy.errors import (
    BundleChangedError,
    BundleNotFoundError,
    DigestError,
    ManifestError,
    MissingFileError,
    PathError,
    TensorError,
    UnknownFileError,
)

# The manifest's types are part of the contract: modules that need both import them from here.
__all__ = [
    "Bundle", "FloatArray", "IntArray", "file_sha256", "open_bundle", "start_opening",
    "FORMAT", "FORMAT_VERSION", "HEAD", "HEAD_BALANCE", "INTEGERS", "LM_HEAD", "MANIFEST", "AdaptationSpec", "FileSpec",
    "GraphSpec", "LimitsSpec", "Manifest", "Mode", "ModelSpec", "Parameters", "ParitySummary", "Precision", "Protocol",
    "Regime", "Role", "StoredTensor", "TargetSpec", "TensorSpec", "TrainedRegime", "available_modes", "default_mode",
    "factor_names", "int8_names", "limits_fault", "parse_manifest",
]  # fmt: skip

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    After `open_bundle` every check has passed. After `start_opening` the digest of the weights is still being computed.
    """

    path: Path
    manifest: Manifest
    digest: str  # SHA-256 of bundle.json, which holds the digests of all other files
    weights_checked: Future[None] = field(compare=False, repr=False)
    stamps: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)  # see `_stamp`
    signed_by: Path | None = field(default=None, compare=False)  # the trusted key, if signatures are required

    def require_weights(self) -> None:
        """Wait for the digest of the weights. Raises DigestError if it differs from the manifest's.

        Call this before returning or storing anything that was computed from the weights.
        """
        self.weights_checked.result()

    def check_unchanged(self) -> None:
        """Compare size, modification time and inode of the manifest and the weights with those at opening.

        Raises BundleChangedError.
        """
        for name, stamp in self.stamps.items():
            try:
                found = _stamp(self.path / name)
            except OSError as error:
                raise BundleChangedError(f"{self.path / name}: {error.strerror}: load the bundle again") from error
            if found != stamp:
                how = "changed in place: results may be wrong" if found[:2] == stamp[:2] else "replaced"
                raise BundleChangedError(f"{self.path / name} was {how}: load the bundle again")

    def graph(self, role: str, provider: str) -> str:
        """Return the name of the graph of a role for a provider. The graph with the fewest providers is the most
        specific and is preferred.
        """
        graphs = self.manifest.graphs
        fitting = [name for name, graph in graphs.items() if graph.role == role and provider in graph.providers]
        if not fitting:
            raise ManifestError(f"{self.path / MANIFEST}: no {role} graph for provider {provider!r}: export again")
        return min(fitting, key=lambda name: len(graphs[name].providers))

    def token_embedding(self) -> TokenEmbedding:
        """Return the token embedding, memory-mapped."""
        spec = self.manifest.token_embedding
        file, (vocab_size, hidden_size) = self.path / spec.file, spec.shape
        stored = np.memmap(file, spec.dtype, "r", spec.offset, spec.shape)
        if spec.row_scales_offset is None or spec.channel_scales_offset is None or spec.rotation is None:
            return TokenEmbedding(stored)
        scales = np.memmap(file, np.float32, "r", spec.row_scales_offset, vocab_size)
        channels = np.memmap(file, np.float32, "r", spec.channel_scales_offset, hidden_size)
        return TokenEmbedding(stored, Int8Rows(scales, channels, spec.rotation))

    def centroids(self) -> FloatArray:
        """Return the centroids, float32 [num_clusters, hidden]."""
        shape = (self.manifest.adaptation.num_clusters, self.manifest.model.hidden_size)
        if not shape[0]:
            return np.empty(shape, np.float32)
        return _read_tensors(self.path / "centroids.safetensors", {"centroids": shape})["centroids"]

    def lora(self) -> dict[str, FloatArray]:
        """Return the trained factors of a bundle of regime lora, in the layout of the decoder's inputs.

        -> float32 [adapters, rank, in_features or out_features] by tensor name, in the order of the adapters' names
        """
        spec = self.manifest.adaptation
        shapes = {name: (len(spec.adapters) or 1, spec.rank, width) for name, width in spec.factor_widths.items()}
        return _read_tensors(self.path / "lora.safetensors", shapes)

    def basis(self) -> dict[str, npt.NDArray[Any]]:
        """Return the tensors of basis.safetensors (runtime/basis.py); none in a bundle without."""
        if not self.manifest.has_basis:
            return {}
        file = self.path / "basis.safetensors"
        expected: dict[str, int | None] = {}
        parts: dict[str, int] = {}
        for target in self.manifest.adaptation.targets:
            if target.name != LM_HEAD:
                names = basis_names(target.name)
                sizes = (target.in_features, None, target.in_features, None, target.out_features)
                expected |= dict(zip(names, sizes, strict=True))
                parts |= {names[1]: target.in_features, names[3]: target.out_features}
        tensors = _load(file)
        if set(tensors) != set(expected):
            raise TensorError(f"{file}: its tensors are not those of the targets")
        for name, tensor in tensors.items():
            if name in parts:
                _check_blocks(file, name, tensor, parts[name])
            elif tensor.dtype != np.float32 or tensor.shape != (expected[name],) or not np.isfinite(tensor).all():
                raise TensorError(f"{file}: {name} is not float32 [{expected[name]}] of finite numbers")
        return tensors


def open_bundle(path: Path, trusted_keys: TrustedKeys | None = None) -> Bundle:
    """Read the manifest and check every file against it.

    trusted_keys  PEM files of Ed25519 public keys: a bundle that none of them signed is refused; None accepts any

    Raises BundleNotFoundError, SignatureError, ManifestError, VersionError, PathError, UnknownFileError,
    MissingFileError, DigestError, TensorError or GraphError.
    """
    bundle = start_opening(path, trusted_keys)
    bundle.require_weights()
    return bundle


def start_opening(path: Path, trusted_keys: TrustedKeys | None = None) -> Bundle:
    """Open a bundle and hash its weights in the background, while the caller opens sessions on it.

    All other checks have been made. The caller calls `Bundle.require_weights` at the end. Raises the errors of
    `open_bundle`.
    """
    try:
        return _start_opening(path, trusted_keys)
    except PermissionError as error:
        raise BundleNotFoundError(f"cannot read {error.filename or path}: {error.strerror}") from error


def _start_opening(path: Path, trusted_keys: TrustedKeys | None) -> Bundle:
    if not path.is_dir():
        raise BundleNotFoundError(f"{path} is not a directory: pass the directory that export wrote")
    if not (path / MANIFEST).is_file():
        raise BundleNotFoundError(f"{path} has no {MANIFEST}: it is not a bundle")
    stamps = {MANIFEST: _stamp(path / MANIFEST)}  # taken before the file is read, so that a later change is noticed
    raw = (path / MANIFEST).read_bytes()
    # Checked first: what no trusted key signed is not even parsed.
    signed_by = None if trusted_keys is None else check_signature(raw, path / SIGNATURE, trusted_keys)
    manifest = parse_manifest(raw, path / MANIFEST)
    check_graphs(manifest, path / MANIFEST)
    _check_listing(path, manifest)
    for name, spec in manifest.files.items():
        _check_size(path / name, spec)
    weights = manifest.token_embedding.file
    stamps[weights] = _stamp(path / weights)
    for name, spec in manifest.files.items():
        if name != weights:
            _check_digest(path / name, spec)
    sizes = {name: spec.size for name, spec in manifest.files.items()}
    for graph in manifest.graphs.values():
        check_graph_file(path / graph.file, sizes)
    thread = ThreadPoolExecutor(1)
    weights_checked = thread.submit(_check_digest, path / weights, manifest.files[weights])
    thread.shutdown(wait=False)  # the thread ends with its only task
    bundle = Bundle(path, manifest, hashlib.sha256(raw).hexdigest(), weights_checked, stamps, signed_by)
    bundle.centroids()
    if manifest.adaptation.regime == "lora":
        bundle.lora()
    bundle.basis()
    return bundle


def _check_listing(path: Path, manifest: Manifest) -> None:
    for entry in sorted(path.iterdir()):
        if entry.is_symlink():
            raise PathError(f"{entry} is a symbolic link: a bundle holds plain files only; copy the file itself")
        if entry.name == SIGNATURE and entry.is_file():
            continue  # it cannot be listed in what it signs
        if entry.name != MANIFEST and entry.name not in manifest.files:
            raise UnknownFileError(f"{entry} is not listed in {MANIFEST}: remove it or export again")
    for name in manifest.files:
        if not (path / name).is_file():
            raise MissingFileError(f"{path / name} is listed in {MANIFEST} but missing: copy the bundle again")


def _check_size(file: Path, spec: FileSpec) -> None:
    size = file.stat().st_size
    if size != spec.size:
        raise DigestError(f"{file}: {size} bytes, {MANIFEST} says {spec.size}: copy the bundle again")


def _check_digest(file: Path, spec: FileSpec) -> None:
    if file_sha256(file) != spec.sha256:
        raise DigestError(f"{file}: its SHA-256 differs from {MANIFEST}: copy the bundle again")


def _stamp(file: Path) -> tuple[int, ...]:
    """Return a fingerprint that a write or a replacement changes: device and inode, then size and modification time."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _load(file: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        return load_file(file)
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError) as error:  # of dtypes that numpy lacks
        raise TensorError(f"{file}: {error}") from error


def _check_blocks(file: Path, name: str, blocks: npt.NDArray[Any], channels: int) -> None:
    """Check the sizes of a rotation's blocks, one for each of equal parts of the channels. Raises TensorError."""
    is_list = blocks.dtype == np.int64 and blocks.ndim == 1 and len(blocks) > 0
    if not is_list or channels % len(blocks) or not np.isin(blocks, (1, 4, 16, 64)).all():
        raise TensorError(f"{file}: {name} is no list of the block sizes 1, 4, 16 and 64 for equal parts of {channels}")
    if (channels // len(blocks) % blocks).any():
        raise TensorError(f"{file}: {name} does not divide {channels} channels")


def _read_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, FloatArray]:
    tensors = _load(file)
    if set(tensors) != set(shapes):
        raise TensorError(f"{file}: holds {sorted(tensors)}, expected {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype != np.float32 or tensor.shape != shape:
            raise TensorError(f"{file}: {name} is {tensor.dtype} {tensor.shape}, expected float32 {shape}")
        if not np.isfinite(tensor).all():
            raise TensorError(f"{file}: {name} holds NaN or infinity")
    return tensors
