"""The local cache: TensorRT engines and packed weights, built on this machine, and bundles from object storage.

    $CHAMELEON_DEPLOY_CACHE (or ~/.cache/chameleon-deploy)/
        {kind}/{SHA-256 of the key, 32 hexadecimal characters}/
            entry.json    the key in full, and the size and SHA-256 of every other file; its mtime is the last use
            ...           whatever the builder wrote
        .{the same}.download/   what has arrived of an entry, see `resumable`

An entry is used only if its key equals the requested key and every file has its digest. Any other entry (damaged,
truncated, made for another machine) is deleted and built again. Digests prove that an entry is whole, not who made it.
Therefore the cache, a kind and an entry must be directories of this user (or root) that nobody else can write to, and
no link is followed below the root.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from chameleon_deploy.contract.bundle import FileSpec, file_sha256
from chameleon_deploy.directory import MARKER, lock, new_directory
from chameleon_deploy.errors import OutputError, PathError

ENTRY = "entry.json"
ENTRY_NAME = re.compile("[0-9a-f]{32}")
# The names of the working directories of `new_directory` and of `resumable`.
PARTIAL_NAME = re.compile(r"\.[0-9a-f]{32}\.(partial|download)")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of entry.json.

    key    everything that the files depend on, such as the bundle's digest, the engine's version and the device's name
    files  by their paths within the entry
    """

    key: dict[str, str]
    files: dict[str, FileSpec]


@dataclass(frozen=True)
class Stored:
    """A directory in the cache.

    key        None for an incomplete or damaged entry, such as a killed process leaves
    size       bytes of all files
    last_used  seconds since the epoch
    """

    kind: str
    path: Path
    key: dict[str, str] | None
    size: int
    last_used: float


def cache_root() -> Path:
    """Return the directory of all entries: $CHAMELEON_DEPLOY_CACHE, else $XDG_CACHE_HOME/chameleon-deploy, else in
    ~/.cache.

    Raises OutputError if none of them is set and the user has no home directory.
    """
    if chosen := os.environ.get("CHAMELEON_DEPLOY_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chameleon-deploy"
    except RuntimeError as error:
        raise OutputError("this user has no home directory: set CHAMELEON_DEPLOY_CACHE to a directory") from error


def entry_path(kind: str, key: Mapping[str, str]) -> Path:
    """Return the path of a key's entry, which may not exist."""
    name = hashlib.sha256(msgspec.json.encode(dict(sorted(key.items())))).hexdigest()[:32]
    return cache_root() / kind / name


def find(kind: str, key: Mapping[str, str]) -> Path | None:
    """Return the directory of an intact entry, or None. Never builds, never deletes.

    Raises PathError if others can write to the cache.
    """
    path = entry_path(kind, key)
    _require_private(cache_root().resolve())  # a link to the cache itself belongs to the user
    _require_private(path.parent)
    if not _is_intact(path, key):
        return None
    with suppress(OSError):  # the cache may be on a read-only file system
        os.utime(path / ENTRY)
    return path


def find_or_build(kind: str, key: Mapping[str, str], build: Callable[[Path], None]) -> Path:
    """Return the directory of an entry; if there is no intact one, build it with `build(empty directory)`.

    One process builds entries of a kind while the others wait for it. The entry appears whole or not at all. Raises
    OutputError if the cache cannot be written, PathError if others can write to it, or what build raises.
    """
    if found := find(kind, key):
        return found
    path = entry_path(kind, key)
    with _locked(path.parent, wait=True):
        if found := find(kind, key):  # another process built it during the wait
            return found
        _remove(path)
        with new_directory(path) as directory:
            directory.chmod(0o700)
            build(directory)
            files = {name: FileSpec(file.stat().st_size, file_sha256(file)) for name, file in _files(directory)}
            entry = Entry(dict(key), files)
            (directory / ENTRY).write_bytes(msgspec.json.format(msgspec.json.encode(entry), indent=2))
    return path


@contextmanager
def resumable(kind: str, key: Mapping[str, str]) -> Iterator[Path]:
    """Yield a directory for parts of an entry, inside `build` of `find_or_build`. It is deleted if the block succeeds.

    What a failed or killed block leaves is there the next time. `prune` deletes it.
    """
    path = entry_path(kind, key)
    parts = path.with_name(f".{path.name}.download")
    _require_private(parts)
    parts.mkdir(mode=0o700, exist_ok=True)
    (parts / MARKER).touch()
    yield parts
    shutil.rmtree(parts)


def stored() -> list[Stored]:
    """Return everything in the cache, most recently used first. What does not look like an entry is left out.

    Raises PathError if others can write to the cache.
    """
    found = [_describe(path) for kind in _kinds() for path in kind.iterdir() if _looks_like_entry(path)]
    return sorted(found, key=lambda entry: -entry.last_used)


def prune(max_bytes: int | None = None, max_age: float | None = None) -> list[Stored]:
    """Delete incomplete and old entries, then the least recently used ones until the rest fits into `max_bytes`.

    max_age  seconds since the last use

    Returns what was deleted. A process that has an entry open keeps it until the process ends. Raises OutputError if a
    process is building an entry, PathError if others can write to the cache.
    """
    deleted, kept_bytes, now = [], 0, time.time()
    with ExitStack() as locks:
        for kind in _kinds():
            locks.enter_context(_locked(kind, wait=False))
        for entry in stored():
            too_old = max_age is not None and now - entry.last_used > max_age
            too_much = max_bytes is not None and kept_bytes + entry.size > max_bytes
            if entry.key is None or too_old or too_much:
                _remove(entry.path)
                deleted.append(entry)
            else:
                kept_bytes += entry.size
    return deleted


def _kinds() -> list[Path]:
    root = cache_root()
    _require_private(root.resolve())
    kinds = [kind for kind in root.iterdir() if kind.is_dir()] if root.is_dir() else []
    for kind in kinds:
        _require_private(kind)
    return kinds


def _require_private(directory: Path) -> None:
    """Raise PathError unless the directory is missing, or is this user's (or root's) and writable by nobody else."""
    try:
        found = directory.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if hasattr(os, "geteuid") and (fault := _fault(found)):
        raise PathError(f"unsafe local cache: {directory} {fault}; set CHAMELEON_DEPLOY_CACHE to a private directory")


def _fault(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to the user with id {found.st_uid}"
    if found.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o}): run chmod go-w on it"
    return None


def _is_intact(path: Path, key: Mapping[str, str]) -> bool:
    try:
        _require_private(path)
        entry = _read_entry(path)
        return (
            entry.key == dict(key)
            and {name for name, _ in _files(path)} == {ENTRY, *entry.files}
            and not any(file.is_symlink() for file in path.rglob("*"))
            and all((path / name).stat().st_size == spec.size for name, spec in entry.files.items())
            and all(file_sha256(path / name) == spec.sha256 for name, spec in entry.files.items())
        )
    except (OSError, PathError, msgspec.MsgspecError, UnicodeDecodeError):
        return False


def _files(directory: Path) -> list[tuple[str, Path]]:
    return [(file.relative_to(directory).as_posix(), file) for file in directory.rglob("*") if not file.is_dir()]


def _read_entry(path: Path) -> Entry:
    return msgspec.json.decode((path / ENTRY).read_bytes(), type=Entry)


def _looks_like_entry(path: Path) -> bool:
    is_left_over = bool(PARTIAL_NAME.fullmatch(path.name)) and (path / MARKER).is_file()
    return path.is_dir() and not path.is_symlink() and (is_left_over or bool(ENTRY_NAME.fullmatch(path.name)))


def _describe(path: Path) -> Stored:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    try:
        return Stored(path.parent.name, path, _read_entry(path).key, size, (path / ENTRY).stat().st_mtime)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return Stored(path.parent.name, path, key=None, size=size, last_used=path.stat().st_mtime)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # missing; or on a read-only file system, which the next write reports
            path.unlink()


@contextmanager
def _locked(kind: Path, *, wait: bool) -> Iterator[None]:
    """Lock the directory of a kind, which is created private. The lock ends with the process that holds it."""
    try:
        for directory in (kind.parent, kind):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = lock(kind, wait=wait)
    except BlockingIOError as error:
        raise OutputError(f"another process is building in {kind}: repeat the command when it is done") from error
    except OSError as error:
        raise OutputError(
            f"cannot write the local cache {kind}: {error.strerror}: set CHAMELEON_DEPLOY_CACHE to a directory "
            "that can be written"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)
