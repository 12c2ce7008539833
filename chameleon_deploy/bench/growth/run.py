"""Measures every point of the curves with the engines in turn, each in its own process."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from chameleon_deploy.bench.growth.curves import CurveName, Point, points
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import InputError
from chameleon_deploy.machine import describe_machine
from chameleon_deploy.terminal.progress import Progress

LONG = 4.0  # seconds: of so long a generation the first one is a sample too, and there is one more at most
PAUSE = 0.3  # seconds before a sample, for the threads of the engine before it to stop spinning


@dataclass(frozen=True)
class Measured:
    """The figures of one engine at one point: medians.

    first_token  seconds from the prompts to their first tokens, factors included
    step         seconds per step of the whole batch
    memory       bytes at the peak, beyond those of the loaded model
    samples      generations measured
    """

    curve: CurveName
    engine: str
    x: int
    first_token: float
    step: float
    memory: int
    samples: int


@dataclass(frozen=True)
class Growth:
    """The results of one run. failed: by engine, or by engine and point, the reason."""

    machine: dict[str, str]
    precision: str
    threads: int
    measured: list[Measured]
    failed: dict[str, str]


def measure_growth(
    bundle: Path,
    reference: Path,
    threads: int,
    curves: Sequence[CurveName],
    engines: Sequence[str],
    rounds: int,
    report: Progress,
    largest: int | None = None,
) -> Growth:
    """Start a worker per engine and measure the curves.

    engines  by the names that `open_peers` has, beside the bundle
    rounds   samples per engine and point, fewer where one takes long
    largest  the largest x of every curve; None for all points

    Raises InputError if the bundle or its checkpoint cannot be opened.
    """
    manifest = open_bundle(bundle).manifest
    measured: list[Measured] = []
    failed: dict[str, str] = {}
    with ExitStack() as running:
        workers = []
        for done, name in enumerate(["bundle", *engines]):
            report("start engines", done, 1 + len(engines))
            worker = running.enter_context(_worker(bundle, reference, name, threads))
            opened = worker.read()
            worker.name = opened.get("name", name)
            if "error" in opened and name == "bundle":
                raise InputError(f"the bundle cannot be measured: {opened['error']}")
            if "error" in opened:
                failed[name] = opened["error"]
            else:
                workers.append(worker)
        for curve in curves:
            taking_part = [worker for worker in workers if curve != "factor_sets" or worker.name == "bundle"]
            todo = points(curve, manifest.model.max_positions, largest)
            for done, point in enumerate(todo):
                report(curve, done, len(todo))
                found = _measure_point(taking_part, point, rounds)
                for worker in list(taking_part):
                    samples = found[worker.name]
                    if isinstance(samples, str):
                        failed[f"{worker.name}, {curve} {point.x}"] = samples
                        taking_part.remove(worker)
                    else:
                        measured.append(_median(curve, worker.name, point.x, samples))
            report(curve, len(todo), len(todo))
    return Growth(describe_machine(), manifest.precision, threads, measured, failed)


def _measure_point(workers: Sequence[_Worker], point: Point, rounds: int) -> dict[str, list[dict[str, float]] | str]:
    """Return the samples of each engine, which take turns in random order, or why one could not do it."""
    shuffle, order = random.Random(0), list(workers)
    found: dict[str, list[dict[str, float]] | str] = {}
    for sampling in range(1 + rounds):
        shuffle.shuffle(order)
        for worker in order:
            samples = found.setdefault(worker.name, [])
            if isinstance(samples, str) or (sampling > 1 and _is_long(samples[0], point)):
                continue
            sample = worker.ask(point)
            if "error" in sample:
                found[worker.name] = str(sample["error"])
            elif sampling == 1 and not _is_long(samples[0], point):
                samples[:] = [sample]  # the first generation only warmed up
            else:
                samples.append(sample)
    return found


def _is_long(sample: dict[str, float], point: Point) -> bool:
    return sample["first_token"] + point.steps * sample["step"] > LONG


def _median(curve: CurveName, engine: str, x: int, samples: list[dict[str, float]]) -> Measured:
    first_token, step, memory = (
        statistics.median(sample[name] for sample in samples) for name in ("first_token", "step", "memory")
    )
    return Measured(curve, engine, x, first_token, step, int(memory), len(samples))


class _Worker:
    """A running worker.py."""

    def __init__(self, process: subprocess.Popen[str], name: str, errors: IO[str]) -> None:
        self.name, self._process, self._errors = name, process, errors

    def read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        found: dict[str, Any] = json.loads(line) if line else {"error": self._end()}
        return found

    def ask(self, point: Point) -> dict[str, Any]:
        time.sleep(PAUSE)
        try:
            print(json.dumps(asdict(point)), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return {"error": self._end()}
        return self.read()

    def _end(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or [""])[-1]
        return f"exit code {code}: {last}"[:200]


@contextmanager
def _worker(bundle: Path, reference: Path, engine: str, threads: int) -> Iterator[_Worker]:
    command = [sys.executable, "-m", "chameleon_deploy.bench.growth.worker", str(bundle), str(reference), engine,
               "--threads", str(threads)]  # fmt: skip
    with (
        TemporaryFile("w+") as errors,  # engines warn there, which would disturb the progress bars
        subprocess.Popen(  # noqa: S603  (our own interpreter and code)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield _Worker(process, engine, errors)
        finally:
            process.kill()
