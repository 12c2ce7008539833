"""What depends on one machine: TensorRT engines and prepacked weights, made here and never shipped in a bundle.

    $CHAMELEON_DEPLOY_CACHE (or ~/.cache/chameleon-deploy)/
        {kind}/{SHA-256 of the key, 32 digits}/
            entry.json    the key in full, and the size and SHA-256 of every other file
            ...           whatever the builder wrote

An entry is used only when its key is the key asked for and every file has its digest; anything else
in its place (damaged, cut off, tampered with, made for another machine) is deleted and built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from chameleon_deploy.bundle import FileSpec, file_sha256
from chameleon_deploy.directory import new_directory
from chameleon_deploy.errors import OutputError

ENTRY = "entry.json"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """key: all that the files depend on, such as the bundle's digest, the engine's version and the device's name."""

    key: dict[str, str]
    files: dict[str, FileSpec]


def cache_root() -> Path:
    """Where all entries are: $CHAMELEON_DEPLOY_CACHE, else $XDG_CACHE_HOME/chameleon-deploy, else in ~/.cache."""
    if chosen := os.environ.get("CHAMELEON_DEPLOY_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chameleon-deploy"


def entry_path(kind: str, key: Mapping[str, str]) -> Path:
    """Where the entry of a key is or would be."""
    name = hashlib.sha256(msgspec.json.encode(dict(sorted(key.items())))).hexdigest()[:32]
    return cache_root() / kind / name


def find(kind: str, key: Mapping[str, str]) -> Path | None:
    """The directory of an intact entry, or None. Never builds, never deletes."""
    path = entry_path(kind, key)
    return path if _is_intact(path, key) else None


def find_or_build(kind: str, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
    """The directory of an entry, built by `build(empty directory)` unless an intact one is there.

    One process builds while the others wait for it. The entry appears whole or not at all.
    Raises OutputError when the cache cannot be written, or what build raises.
    """
    if found := find(kind, key):
        return found
    path = entry_path(kind, key)
    with _lock(path):
        if found := find(kind, key):  # another process built it while this one waited
            return found
        shutil.rmtree(path, ignore_errors=True)
        with new_directory(path) as directory:
            build(directory)
            files = {file.name: FileSpec(file.stat().st_size, file_sha256(file)) for file in directory.iterdir()}
            entry = Entry(dict(key), files)
            (directory / ENTRY).write_bytes(msgspec.json.format(msgspec.json.encode(entry), indent=2))
    return path


def _is_intact(path: Path, key: Mapping[str, str]) -> bool:
    try:
        entry = msgspec.json.decode((path / ENTRY).read_bytes(), type=Entry)
        names = {file.name for file in path.iterdir()} - {ENTRY}
        return (
            entry.key == dict(key)
            and names == set(entry.files)
            and all(not (path / name).is_symlink() for name in names)
            and all((path / name).stat().st_size == spec.size for name, spec in entry.files.items())
            and all(file_sha256(path / name) == spec.sha256 for name, spec in entry.files.items())
        )
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return False


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; it ends with the process that holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise OutputError(
            f"cannot write the local cache {path.parent}: {error.strerror}: set CHAMELEON_DEPLOY_CACHE to a directory "
            "that can be written"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
