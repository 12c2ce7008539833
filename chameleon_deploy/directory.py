"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from chameleon_deploy.errors import OutputError, OutputExistsError

MARKER = ".chameleon-deploy"  # in every working directory: one without it was made by something else and is left alone


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all, with the permissions that the umask gives.

    write  called with a temporary path in the same directory and with the same suffix. If `path` is a link, the
           link stays and its target is replaced. A device or a pipe is written to directly.

    Raises OutputError if the file cannot be written, and whatever `write` raises.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        write(path)  # a device or a pipe
        return
    target = path.resolve()
    partial = target.with_name(f".partial-{os.urandom(4).hex()}{target.suffix}")
    try:
        mode = _create(partial)
        write(partial)
        _publish(partial, mode)
        os.replace(partial, target)
        _sync_directory(target.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error
    finally:
        with suppress(OSError):  # already renamed after success
            partial.unlink()


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a working directory that is renamed to `out` when the block ends without an error.

    The working directory is in `.{name}.partial` next to `out`. A failure removes both. A kill leaves them, and the
    next writer clears them. The lock on `.{name}.partial` ends with the process that holds it.

    Raises OutputExistsError if `out` exists. Raises OutputError if it cannot be written, if another process is writing
    it, or if `.{name}.partial` is a link, is owned by another user, or was not created by this package.
    """
    if os.path.lexists(out):
        raise OutputExistsError(f"{out} exists: choose another --out or delete it")
    partial = out.with_name(f".{out.name}.partial")
    with locked_directory(partial, f"another process is writing {out}: wait for it or choose another --out"):
        _check_ours(partial)
        try:
            mode = _start(partial)
            directory = partial / out.name
            directory.mkdir()
            yield directory
            for file in directory.rglob("*"):
                if file.is_file():
                    _publish(file, mode)
            _sync_directory(directory)
            if os.path.lexists(out):  # rename would replace an empty directory
                raise OutputExistsError(f"{out} appeared while it was being written: choose another --out")
            os.rename(directory, out)
            _sync_directory(out.parent)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {out}: {_reason(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked_directory(path: Path, busy: str) -> Iterator[None]:
    """Create a directory and lock it, so that one process at a time works in it. The lock ends with the process.

    path  not a symbolic link
    busy  the error message if another process has the lock

    Raises OutputError.
    """
    try:
        descriptor = _make_and_lock(path)
    except BlockingIOError as error:
        raise OutputError(busy) from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(descriptor)


def lock(path: Path, *, wait: bool) -> int:
    """Take an exclusive lock on a directory.

    Returns a descriptor; closing it, or the end of the process, releases the lock. Raises BlockingIOError if another
    process holds it and wait is False, OSError if the path is a link or not a directory, OutputError on systems without
    such locks.
    """
    try:
        import fcntl  # imported here, since the light runtime is imported on Windows too
    except ImportError as error:
        raise OutputError("this system has no POSIX file locks: write on Linux or macOS") from error
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _make_and_lock(path: Path) -> int:
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = lock(path, wait=False)
        except FileNotFoundError:  # the process that held it has just removed it
            continue
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether the path still leads to the open directory; it may have been removed before the lock."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _check_ours(partial: Path) -> None:
    """Refuse a directory that another user owns, or that holds files and no marker: clearing it would lose data."""
    if partial.stat().st_uid != os.geteuid():
        raise OutputError(f"{partial} belongs to another user: choose another --out")
    if any(partial.iterdir()) and not (partial / MARKER).is_file():
        raise OutputError(f"{partial} exists and was not made by chameleon-deploy: move it or choose another --out")


def _start(partial: Path) -> int:
    """Clear what a killed process left. Return the mode of new files."""
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()
    (partial / MARKER).unlink(missing_ok=True)
    return _create(partial / MARKER)


def _create(path: Path) -> int:
    """Create an empty file. Return its mode, which is what the umask leaves of 0666."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _publish(file: Path, mode: int) -> None:
    """Set the mode, and sync the data before the rename, so that a power failure leaves no half-written file."""
    file.chmod(mode)  # safetensors writes files that only their owner can read
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
