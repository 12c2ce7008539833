"""A bundle served over HTTP by its own process, as users start it."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import httpx

from chameleon_deploy.errors import CheckFailedError

SECONDS = 3600.0  # for one answer


@contextlib.contextmanager
def served(
    bundle: Path, log: Path, threads: int, rows: int, capacity: int, options: Sequence[str] = ()
) -> Iterator[str]:
    """Serve a bundle, and give its address. Raises CheckFailedError where the server ends."""
    with serving(bundle, log, threads, rows, capacity, options) as (url, _):
        yield url


@contextlib.contextmanager
def serving(
    bundle: Path, log: Path, threads: int, rows: int, capacity: int, options: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """The same, with the id of the server's process."""
    given = {"--port": 0, "--threads": threads, "--rows": rows, "--capacity": capacity}
    words = [str(word) for option in given.items() for word in option]
    command = [sys.executable, "-m", "chameleon_deploy.serve", str(bundle), *words, *options]
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=out) as server,  # noqa: S603
        _ending_with(server),
    ):
        try:
            while not ((found := re.search(r"http://[\d.]+:\d+", log.read_text())) and _is_healthy(found[0])):
                if server.poll() is not None:
                    raise CheckFailedError(f"{bundle} is not served: see {log}")
                time.sleep(0.2)
            yield found[0], server.pid
        finally:
            server.terminate()


@contextlib.contextmanager
def _ending_with(server: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a server with this process where that is told to end, in place of leaving it behind."""

    def end(number: int, _: FrameType | None) -> None:
        server.terminate()
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False
