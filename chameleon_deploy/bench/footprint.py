"""What a bundle costs a process: time to load, and memory. Everything is measured in fresh processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

_WORKER = """
import sys, time
start = time.perf_counter()
import chameleon_deploy
path, work, threads, batch, width, new_tokens = *sys.argv[1:3], *map(int, sys.argv[3:])
runtime = chameleon_deploy.load(path, threads=threads, share_weights=work == "share weights")
seconds = time.perf_counter() - start
def memory(file, *keys):
    return sum(int(line.split()[1]) * 1024 for line in open(f"/proc/self/{file}") if line.startswith(keys))
loaded, private = memory("status", "VmRSS"), memory("smaps_rollup", "Private_Clean", "Private_Dirty")
vocab = runtime.manifest.model.vocab_size
rows = [[(31 * row + 7 * i) % vocab for i in range(width)] for row in range(batch)]
if work == "generate":
    runtime.generate(rows, max_new_tokens=new_tokens)
if work == "score":
    runtime.score(rows)
if work == "score with full logits":
    from chameleon_deploy.bench.peers.bundle import FullLogits
    FullLogits(runtime).score(rows)
print(seconds, loaded, private, memory("status", "VmRSS"), memory("status", "VmHWM"), flush=True)
sys.stdin.read()  # stay until told to go
"""


@dataclass(frozen=True)
class Footprint:
    """seconds   from the first import to a loaded runtime, files checked
    resident  bytes after it; resident_after_generating after a generation; peak at most
    private   bytes of a further worker process after loading, which it shares with nobody
    shared_seconds, shared_private  the same two of a further worker where all of them share the weights
    peak_scoring, peak_full_logits  at most when it scores instead, as it does and with all logits in memory
    """

    seconds: float
    resident: int
    private: int
    resident_after_generating: int
    peak: int
    shared_seconds: float
    shared_private: int
    peak_scoring: int
    peak_full_logits: int


def measure_footprint(
    bundle: Path, threads: int, rounds: int, batch: int = 1, width: int = 64, new_tokens: int = 4
) -> Footprint:
    """Medians over `rounds` processes, each of which loads and generates batch x (width + new_tokens) tokens, and over
    as many that load and share the weights; two more load and score.

    All of them start while another worker of their kind has the bundle loaded. The local cache is a temporary one.
    """

    def medians(work: str, count: int) -> list[float]:
        runs = []
        for _ in range(count):
            worker = _start(bundle, work, cache, threads, batch, width, new_tokens)
            runs.append(_figures(worker))
            worker.communicate("")
        return [statistics.median(column) for column in zip(*runs, strict=True)]

    with TemporaryDirectory() as cache:
        with _another(bundle, "load", cache, threads):
            seconds, resident, private, resident_after_generating, peak = medians("generate", rounds)
            peak_scoring, peak_full_logits = (medians(work, 1)[-1] for work in ("score", "score with full logits"))
        with _another(bundle, "share weights", cache, threads):
            shared_seconds, _, shared_private, *_ = medians("share weights", rounds)
    return Footprint(
        seconds=seconds,
        resident=int(resident),
        private=int(private),
        resident_after_generating=int(resident_after_generating),
        peak=int(peak),
        shared_seconds=shared_seconds,
        shared_private=int(shared_private),
        peak_scoring=int(peak_scoring),
        peak_full_logits=int(peak_full_logits),
    )


@contextmanager
def _another(bundle: Path, work: str, cache: str, threads: int) -> Iterator[None]:
    """While a worker has the bundle loaded and does nothing."""
    worker = _start(bundle, work, cache, threads, 0, 0, 0)
    try:
        _figures(worker)
        yield
    finally:
        worker.communicate("")


def _start(bundle: Path, work: str, cache: str, *numbers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603  (our own interpreter and code)
        [sys.executable, "-c", _WORKER, str(bundle), work, *map(str, numbers)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "CHAMELEON_DEPLOY_CACHE": cache},
    )  # fmt: skip


def _figures(worker: subprocess.Popen[str]) -> list[float]:
    if line := worker.stdout.readline() if worker.stdout else "":
        return [float(figure) for figure in line.split()]
    raise subprocess.CalledProcessError(worker.wait(), worker.args)
