"""What a command names as its reference: a checkpoint, or a base model with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from chameleon_deploy.errors import InputError
from chameleon_deploy.reference.adapters import AdaptedBase, load_adapted
from chameleon_deploy.reference.checkpoint import CONFIG_FILE, Checkpoint, load_checkpoint

Source = Checkpoint | AdaptedBase


def load_source(path: Path, base: str | None, adapters: Mapping[str, Path]) -> Source:
    """Load a checkpoint, or the base model at `path` with adapters if there are any.

    base  see `load_checkpoint`

    Raises InputError, and the errors of `load_checkpoint` and `load_adapted`.
    """
    if not adapters:
        return load_checkpoint(path, base)
    if base is not None or (path / CONFIG_FILE).is_file():
        raise InputError(f"{path}: adapters are of a base model: pass its directory or hub id in its place")
    return load_adapted(str(path), adapters)
