"""What a bundle costs a process: time to load, and memory. Everything is measured in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_WORKER = """
import sys, time
start = time.perf_counter()
import chameleon_deploy
path, work, threads, batch, width, new_tokens = *sys.argv[1:3], *map(int, sys.argv[3:])
runtime = chameleon_deploy.load(path, threads=threads)
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
    from chameleon_deploy.peers.bundle import FullLogits
    FullLogits(runtime).score(rows)
print(seconds, loaded, private, memory("status", "VmRSS"), memory("status", "VmHWM"), flush=True)
sys.stdin.read()  # stay until told to go
"""


@dataclass(frozen=True)
class Footprint:
    """seconds   from the first import to a loaded runtime, files checked, and whatever the local cache keeps in place
    resident  bytes after it; resident_after_generating after a generation; peak at most
    private   bytes of a further worker process after loading, which it shares with nobody
    peak_scoring, peak_full_logits  at most when it scores instead, as it does and with all logits in memory
    """

    seconds: float
    resident: int
    private: int
    resident_after_generating: int
    peak: int
    peak_scoring: int
    peak_full_logits: int


def measure_footprint(
    bundle: Path, threads: int, rounds: int, batch: int = 1, width: int = 64, new_tokens: int = 4
) -> Footprint:
    """Medians over `rounds` processes, each of which loads and generates batch x (width + new_tokens) tokens; two more
    load and score.

    All of them start while another worker has the bundle loaded, which also has filled the local cache.
    """
    first = _start(bundle, "load", threads, 0, 0, 0)
    try:
        _figures(first)

        def medians(work: str, count: int) -> list[float]:
            runs = []
            for _ in range(count):
                worker = _start(bundle, work, threads, batch, width, new_tokens)
                runs.append(_figures(worker))
                worker.communicate("")
            return [statistics.median(column) for column in zip(*runs, strict=True)]

        seconds, *sizes = medians("generate", rounds)
        peaks = [medians(work, 1)[-1] for work in ("score", "score with full logits")]
    finally:
        first.communicate("")
    return Footprint(seconds, *map(int, [*sizes, *peaks]))


def _start(bundle: Path, work: str, *numbers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603  (our own interpreter and code)
        [sys.executable, "-c", _WORKER, str(bundle), work, *map(str, numbers)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _figures(worker: subprocess.Popen[str]) -> list[float]:
    if line := worker.stdout.readline() if worker.stdout else "":
        return [float(figure) for figure in line.split()]
    raise subprocess.CalledProcessError(worker.wait(), worker.args)
