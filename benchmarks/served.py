"""A bundle served over HTTP by its own process, as users start it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from chameleon_deploy.errors import CheckFailedError

SECONDS = 3600.0  # for one answer


@contextlib.contextmanager
def served(bundle: Path, log: Path, threads: int, rows: int, capacity: int) -> Iterator[str]:
    """Serve a bundle, and give its address. Raises CheckFailedError where the server ends."""
    options = {"--port": 0, "--threads": threads, "--rows": rows, "--capacity": capacity}
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "chameleon_deploy.serve", str(bundle), *words]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:  # noqa: S603
        try:
            while not ((found := re.search(r"http://[\d.]+:\d+", log.read_text())) and _is_healthy(found[0])):
                if server.poll() is not None:
                    raise CheckFailedError(f"{bundle} is not served: see {log}")
                time.sleep(0.2)
            yield found[0]
        finally:
            server.terminate()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False
