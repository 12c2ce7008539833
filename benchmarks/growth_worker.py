"""A process with one engine: it reads points as JSON lines, and prints the seconds and bytes of each.

Engines run in processes of their own, so that the memory of one is not counted for another. llama.cpp runs in a child
of this process, whose memory counts too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer

import chameleon_deploy
from benchmarks.growth import Point
from chameleon_deploy.bench.peers import DECODE, PREFILL, Peer, open_peers
from chameleon_deploy.bench.peers.bundle import Bundle
from chameleon_deploy.bench.processors import own_processes
from chameleon_deploy.bench.workloads import text_rows
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.terminal import console

WARM_UP = Point(0, batch=1, width=32, steps=2)


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    reference: Annotated[Path, typer.Argument(help="The checkpoint that the bundle was exported from.")],
    engine: Annotated[str, typer.Argument(help="Name of the engine; `bundle` is the bundle itself.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")],
) -> None:
    """Answer each line of standard input, a point as JSON, with a line of figures."""
    torch.set_num_threads(threads)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    checkpoint = load_checkpoint(reference)
    with TemporaryDirectory() as directory:
        is_bundle = engine == "bundle"
        peers, missing = open_peers(runtime, checkpoint, threads, Path(directory), not is_bundle,
                                    [engine])  # fmt: skip
        peer = peers[0] if is_bundle else next(iter(peers[1:]), None)
        if peer is None:
            _print({"error": missing.get(engine, "there is no engine of this name")})
            return
        worker = _Worker(runtime, checkpoint, peer)
        _print({"name": worker.peer.name})
        for line in sys.stdin:
            try:
                _print(worker.measure(Point(**json.loads(line))))
            except Exception as error:  # a foreign engine may raise anything
                _print({"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]})


class _Worker:
    def __init__(self, runtime: Runtime, checkpoint: Checkpoint, peer: Peer) -> None:
        self.peer = peer
        self._runtime, self._checkpoint = runtime, checkpoint
        self._prompts: dict[tuple[int, int], list[list[int]]] = {}
        self._run(WARM_UP, lambda lap: None)  # reads weights that are mapped, which belong to the loaded model
        self._loaded = _memory("VmRSS")

    def measure(self, point: Point) -> dict[str, float]:
        """Return seconds to the first tokens and per step, and the bytes beyond those of the loaded model."""
        self._prompts_of(point)  # outside the measured time
        for pid in own_processes():
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak
        ends = {}
        start = time.perf_counter()
        self._run(point, lambda lap: ends.update({lap: time.perf_counter()}))
        first_token, step = ends[PREFILL] - start, (ends[DECODE] - ends[PREFILL]) / point.steps
        return {"first_token": first_token, "step": step, "memory": max(0, _memory("VmHWM") - self._loaded)}

    def _run(self, point: Point, lap: Callable[[str], None]) -> None:
        prompts = self._prompts_of(point)
        if point.factor_sets is None:
            self.peer.generate(prompts, point.steps + 1, lap)
            return
        if not isinstance(self.peer, Bundle):
            raise ValueError("it has no factor sets")
        sets = self._runtime.adapt(prompts, mode="request", on_device=True).factors.sets
        factors = RowFactors(sets[np.arange(point.factor_sets)], np.arange(point.batch) % point.factor_sets)
        self.peer.generate_with(prompts, factors, point.steps + 1, lap)

    def _prompts_of(self, point: Point) -> list[list[int]]:
        shape = point.batch, point.width
        if shape not in self._prompts:
            self._prompts[shape] = text_rows(self._checkpoint, *shape)
        return self._prompts[shape]


def _memory(key: str) -> int:
    """Return bytes of this process and its children, from /proc, which gives them in kB."""
    lines = (line for pid in own_processes() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _print(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    console.run(main)
