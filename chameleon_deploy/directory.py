"""A directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chameleon_deploy.errors import OutputError, OutputExistsError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a working directory that is renamed to `out` when the block ends without an error.

    The working directory is `.{name}.partial` beside `out`. A failure removes it; a kill leaves it
    for the next writer, who clears it. The lock on it ends with the process that holds it.

    Raises OutputExistsError when `out` exists, OutputError when it cannot be written or another process is writing it.
    """
    if os.path.lexists(out):
        raise OutputExistsError(f"{out} exists: choose another --out or delete it")
    partial = out.with_name(f".{out.name}.partial")
    with locked_directory(partial, f"another process is writing {out}: wait for it or choose another --out"):
        _clear(partial)
        try:
            yield partial
            _sync(partial)
            if os.path.lexists(out):  # rename would replace an empty directory
                raise OutputExistsError(f"{out} appeared while it was being written: choose another --out")
            os.rename(partial, out)
            _sync_one(out.parent)
        except OSError as error:
            raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked_directory(path: Path, busy: str) -> Iterator[None]:
    """Make a directory, and hold it so that one process at a time works there; the lock ends with the process.

    busy  what to say when another process has it

    Raises OutputError.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputError(busy) from error
    try:
        yield
    finally:
        os.close(lock)


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(directory: Path) -> None:
    """Data reaches the disk before the name does, so that a power failure leaves no half-written bundle."""
    mode = 0o666 & ~_umask()
    for entry in directory.iterdir():
        entry.chmod(mode)  # safetensors writes files that only their owner can read
        _sync_one(entry)
    _sync_one(directory)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
