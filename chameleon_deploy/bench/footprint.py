"""Time to load a bundle, and its memory, measured in fresh processes, which run worker.py."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Footprint:
    """Seconds and bytes of one worker process.

    load_seconds         from the first import to a loaded runtime with checked files
    resident             after loading
    peak                 maximum, with a generation
    shared_load_seconds  load_seconds of an additional worker, if all of them share the weights
    shared_private       memory that only such a worker has after loading, without pages of files, of which the kernel
                         keeps one copy for all processes
    """

    load_seconds: float
    resident: int
    peak: int
    shared_load_seconds: float
    shared_private: int


def measure_footprint(
    bundle: Path, threads: int, rounds: int, batch: int = 1, width: int = 64, new_tokens: int = 4
) -> Footprint:
    """Return medians over `rounds` processes that load and generate, and over as many that load and share the weights.

    They generate batch x (width + new_tokens) tokens. All of them start while another worker of their kind has the
    bundle loaded. The local cache is a temporary one.
    """
    with TemporaryDirectory() as cache:
        load = _Worker(bundle, cache, threads)
        with load.running():
            generating = [load.figures(batch, width, new_tokens) for _ in range(rounds)]
        share = _Worker(bundle, cache, threads, "--share-weights")
        with share.running():
            sharing = [share.figures() for _ in range(rounds)]
    return Footprint(
        load_seconds=_median(generating, "load_seconds"),
        resident=int(_median(generating, "resident")),
        peak=int(_median(generating, "peak")),
        shared_load_seconds=_median(sharing, "load_seconds"),
        shared_private=int(_median(sharing, "private")),
    )


class _Worker:
    """Starts processes of one kind."""

    def __init__(self, bundle: Path, cache: str, threads: int, *options: str) -> None:
        self._command = [sys.executable, "-P", str(WORKER), str(bundle), "--threads", str(threads), *options]
        self._environment = {**os.environ, "CHAMELEON_DEPLOY_CACHE": cache}

    def figures(self, batch: int = 0, width: int = 0, new_tokens: int = 0) -> dict[str, float]:
        """Return what one process prints; it has ended by then."""
        with self.running(batch, width, new_tokens) as printed:
            return printed

    @contextmanager
    def running(self, batch: int = 0, width: int = 0, new_tokens: int = 0) -> Iterator[dict[str, float]]:
        """Yield while a process that has loaded the bundle and done its work waits for the end of the block."""
        work = ["--batch", str(batch), "--width", str(width), "--new-tokens", str(new_tokens)]
        command = [*self._command, *work]
        process = subprocess.Popen(  # noqa: S603  (our own interpreter and code)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise subprocess.CalledProcessError(process.wait(), command)
            yield json.loads(line)
        finally:
            process.communicate("")


def _median(figures: list[dict[str, float]], name: str) -> float:
    return statistics.median(of_one[name] for of_one in figures)
