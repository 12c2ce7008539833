"""`LD_PRELOAD=faults.so python -m tests.fault_points TARGET DIRECTORY POINTS`: what a writer leaves at each fault.

A target writes files in a process that is forked for each point. There the writer is killed, gets EIO once, or finds
the disk full or read-only from then on. Prints what must not be, one JSON line per fault, and the number of points.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

import chameleon_deploy
from chameleon_deploy.contract.adapter_file import read_adapter, write_adapter
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.store import local_cache, remote
from tests.ports import free_port
from tests.shared_data import good_bundle

ACTIONS = {"kill": (0, False), "EIO": (errno.EIO, False), "ENOSPC": (errno.ENOSPC, True), "EROFS": (errno.EROFS, True)}
DONE, REFUSED, FOREIGN, KILLED = 0, 2, 3, -9
GOOD = good_bundle("chameleon_masked")


@dataclass(frozen=True)
class Target:
    """A writer, and what it may leave.

    write     changes files in a directory
    fault     says what is wrong with the directory after a process that ended with an exit code, or None
    leftover  a pattern of what a fault may leave until the next run
    """

    write: Callable[[Path], object]
    fault: Callable[[Path, int], str | None]
    leftover: str


def export_target(directory: Path) -> Target:
    import torch  # not for the other targets: it takes seconds

    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.random import random_checkpoint

    torch.set_num_threads(1)  # no threads before the fork
    random_checkpoint(directory / "checkpoint", "mini")
    checkpoint = load_checkpoint(directory / "checkpoint")
    return Target(lambda at: export_bundle(checkpoint, at / "new"), _bundle_fault, ".new.partial")


def adapter_target(directory: Path) -> Target:
    """An adapter file that takes the place of another."""
    spec = msgspec.structs.replace(open_bundle(GOOD).manifest.adaptation, base_digest="0" * 64)
    versions = [{name: np.full((2, width), value, np.float32) for name, width in spec.factor_widths.items()}
                for value in (1, 2)]  # fmt: skip

    def write(at: Path) -> None:
        with suppress(OSError):  # of this test's own directory: the adapter cannot be written then
            (at / "new").mkdir(exist_ok=True)
        for version in versions:
            write_adapter(at / "new" / "legal.safetensors", version, spec)

    def fault(at: Path, code: int) -> str | None:
        file = at / "new" / "legal.safetensors"
        if not file.exists():
            return "it is missing" if code == DONE else None
        try:
            found = read_adapter(file, spec).factors
        except ChameleonError as error:
            return str(error)
        allowed = versions[1:] if code == DONE else versions
        is_whole = any(all((found[name] == version[name]).all() for name in version) for version in allowed)
        return None if is_whole else "it is no version of the adapter"

    return Target(write, fault, "new")


def download_target(directory: Path) -> Target:
    """A bundle that comes from an HTTP server into the local cache."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(GOOD.parent), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    while not _listens(port):
        time.sleep(0.1)

    def fetch(at: Path) -> None:
        os.environ["CHAMELEON_DEPLOY_CACHE"] = str(at / "cache")
        found = remote.fetch(f"http://127.0.0.1:{port}/{GOOD.name}")
        if digests(found) != digests(GOOD):
            raise RuntimeError("the download is another bundle")

    return Target(fetch, _cache_fault, "cache")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def plain_target(directory: Path) -> Target:
    """A writer that does what this package must not do, to see that its faults are found."""
    return Target(lambda at: shutil.copytree(GOOD, at / "new"), _bundle_fault, ".new.partial")


def cache_target(directory: Path) -> Target:
    return Target(_load_shared, _cache_fault, "cache")


def _bundle_fault(directory: Path, code: int) -> str | None:
    """The new bundle is whole or absent."""
    if not (directory / "new").exists():
        return "it is missing" if code == DONE else None
    try:
        open_bundle(directory / "new")
    except ChameleonError as error:
        return str(error)
    return None


def _load_shared(directory: Path) -> None:
    """Build a cache entry and use it. A result that is not that of the bundle is a fault."""
    os.environ["CHAMELEON_DEPLOY_CACHE"] = str(directory / "cache")
    runtime = chameleon_deploy.load(GOOD, threads=1, share_weights=True)
    expected = chameleon_deploy.load(GOOD, threads=1)
    if runtime.generate(["The river"]) != expected.generate(["The river"]):
        raise RuntimeError("the cache changes results")


def _cache_fault(directory: Path, code: int) -> str | None:
    os.environ["CHAMELEON_DEPLOY_CACHE"] = str(directory / "cache")
    damaged = [entry for entry in local_cache.stored() if entry.key and not local_cache.find(entry.kind, entry.key)]
    return f"{damaged} is not intact" if damaged else None


TARGETS = {
    "export": export_target,
    "adapter": adapter_target,
    "cache": cache_target,
    "download": download_target,
    "plain": plain_target,
}


class Faults:
    """The shim in this process."""

    def __init__(self, directory: Path) -> None:
        self._library, self._directory = ctypes.CDLL(None), str(directory).encode()

    def arm(self, at: int, action: str) -> None:
        error, stays = ACTIONS[action]
        self._library.fault_arm(self._directory, ctypes.c_long(at), error, int(stays))

    @property
    def count(self) -> int:
        return int(self._library.fault_count())


def run(target: Target, directory: Path, faults: Faults, at: int, action: str) -> tuple[int, int]:
    """Write with a fault, in a process of its own. Return its exit code and how many operations it counted."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        code = FOREIGN
        try:
            faults.arm(at, action)
            target.write(directory)
            code = DONE
        except ChameleonError:
            code = REFUSED
        except BaseException as error:
            print(f"{at} {action}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os.write(writer, str(faults.count).encode())
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        count = pipe.read()
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), int(count or 0)


def try_point(target: Target, directory: Path, faults: Faults, at: int, action: str) -> list[str]:
    """Write with a fault, then without one. Return what is wrong."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(GOOD, directory / "good")
    before = digests(directory / "good")
    code, _ = run(target, directory, faults, at, action)
    wrong = [] if code in (DONE, REFUSED, KILLED) else [f"exit code {code}"]
    wrong += [fault] if (fault := target.fault(directory, code)) else []
    wrong += [
        f"{path.name} is left" for path in directory.iterdir() if path.name not in ("good", "new", target.leftover)
    ]
    shutil.rmtree(directory / "new", ignore_errors=True)
    code, _ = run(target, directory, faults, 0, "kill")
    wrong += [] if code == DONE else [f"the next run ends with exit code {code}"]
    wrong += [f"after the next run: {fault}"] if (fault := target.fault(directory, code)) else []
    wrong += ["the good bundle changed"] if digests(directory / "good") != before else []
    return wrong


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def main() -> None:
    name, directory, wanted = sys.argv[1], Path(sys.argv[2]).resolve(), int(sys.argv[3])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    target, faults = TARGETS[name](directory), Faults(directory / "at")
    (directory / "first").mkdir()
    target.write(directory / "first")  # so that no fork has to import what it imports
    (directory / "at").mkdir()
    code, count = run(target, directory / "at", faults, 0, "kill")
    if code != DONE or not count:
        raise RuntimeError(f"without a fault: exit code {code}, {count} operations")
    points = [(1 + i * count // wanted, list(ACTIONS)[i % len(ACTIONS)]) for i in range(wanted)]
    for at, action in points:
        if wrong := try_point(target, directory / "at", faults, at, action):
            print(json.dumps({"at": at, "of": count, "action": action, "wrong": wrong}))
    print(json.dumps({"points": len(points), "operations": count}))


if __name__ == "__main__":
    main()
