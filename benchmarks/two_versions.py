"""The same work by two versions of this package, each on a bundle of its own, interleaved.

    git worktree add ../older 9ece1a7
    python -m benchmarks.two_versions --older ../older models/older-int8 --newer . models/newer-int8

Each version has a process, so that only one is at work at a time. A round runs every workload in both, in turns of who
begins; a ratio is the median over rounds of the older's time divided by the newer's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, Annotated, cast

import typer

from chameleon_deploy.errors import CheckFailedError
from chameleon_deploy.terminal import console

TOKENS, STEPS = 128, 64
WORKLOADS = ("score 8", "prompt 8", "steps 1", "steps 8", "steps 32")  # and the rows of each
# What both versions understand.
WORKER = f"""
import sys, time
import numpy as np
import chameleon_deploy
from chameleon_deploy import Sampling
runtime = chameleon_deploy.load(sys.argv[1], threads=int(sys.argv[2]), mode="none")
whole = Sampling(ignore_eos=True)
random = np.random.default_rng(0)
rows = random.integers(1, runtime.manifest.model.vocab_size, (32, {TOKENS})).tolist()
def work(kind, count):
    if kind == "score":
        runtime.score(rows[:count])
    elif kind == "prompt":
        runtime.generate(rows[:count], max_new_tokens=1, sampling=whole)
    else:
        runtime.generate([ids[:8] for ids in rows[:count]], max_new_tokens={STEPS}, sampling=whole)
print("ready", flush=True)
for line in sys.stdin:
    kind, count = line.split()
    began = time.perf_counter()
    work(kind, int(count))
    print(time.perf_counter() - began, flush=True)
"""


class Version:
    """A process of one version, which does one workload at a time."""

    def __init__(self, tree: Path, bundle: Path, threads: int) -> None:
        command = [sys.executable, "-c", WORKER, str(bundle.resolve()), str(threads)]
        process = subprocess.Popen(  # noqa: S603  (our own code)
            command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree.resolve())}, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._process = process
        self._requests, self._answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
        if self._answer() != "ready":
            raise CheckFailedError(f"{tree}: its version does not load {bundle}")

    def seconds(self, workload: str) -> float:
        """Do a workload."""
        self._requests.write(workload + "\n")
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        return self._answers.readline().strip()


def main(
    older: Annotated[tuple[Path, Path], typer.Option(metavar="TREE BUNDLE", help="The older version's.")],
    newer: Annotated[tuple[Path, Path], typer.Option(metavar="TREE BUNDLE", help="The newer version's.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often each does each workload.")] = 11,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each.")] = 2,
) -> None:
    """Print the ratio of times of each workload, and of the bundles' sizes."""
    versions = [Version(*older, threads), Version(*newer, threads)]
    found: dict[str, list[float]] = {workload: [] for workload in WORKLOADS}
    for number in range(-1, rounds):  # the first is not counted
        for workload, ratios in found.items():
            order = versions if number % 2 else versions[::-1]
            seconds = {id(version): version.seconds(workload) for version in order}
            if number >= 0:
                ratios.append(seconds[id(versions[0])] / seconds[id(versions[1])])
    for version in versions:
        version.close()
    for workload, ratios in found.items():
        low, *_, high = statistics.quantiles(ratios, n=4) if rounds > 1 else (ratios[0],) * 3
        console.stdout.print(f"{workload}: {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f})")
    sizes = [sum(file.stat().st_size for file in bundle.iterdir()) for _, bundle in (older, newer)]
    console.stdout.print(f"bytes: {sizes[0]:,} and {sizes[1]:,}, {sizes[0] / sizes[1]:.3f}")


if __name__ == "__main__":
    console.run(main)
