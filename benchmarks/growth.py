"""How time and memory of each engine grow with the batch, the length of the text and the number of factor sets.

    python -m benchmarks.growth BUNDLE --reference CHECKPOINT --json growth.json

Measures every point of the curves with the engines in turn, each in a process of its own, which runs growth_worker.py.
growth_plots.py draws the curves.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Annotated, Any

import typer

from chameleon_deploy.bench.peers import LLAMA_TYPES
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet


class CurveName(StrEnum):
    """What grows."""

    BATCH = "batch"
    LENGTH = "length"
    FACTOR_SETS = "factor_sets"


CURVES = tuple(CurveName)

STEPS = 16  # after the first token
PAST = 128  # tokens of each prompt where the length is not what grows
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (32, 128, 512, 1024, 2048, 4096, 8192, 16384)
LONG = 4.0  # seconds: of so long a generation the first one is a sample too, and there is one more at most
PAUSE = 0.3  # seconds before a sample, for the threads of the engine before it to stop spinning
TITLES = {
    CurveName.BATCH: "Batch: prompts of 128 tokens",
    CurveName.LENGTH: "Length of the prompt: one row",
    CurveName.FACTOR_SETS: "Factor sets: 64 rows, prompts of 128 tokens",
}
AXES = {CurveName.BATCH: "rows", CurveName.LENGTH: "tokens of the prompt", CurveName.FACTOR_SETS: "factor sets"}
FIGURES = (  # of a point: name, attribute, factor to the unit
    ("first token, ms", "first_token", 1e3),
    ("step, ms", "step", 1e3),
    ("memory beyond the loaded model, MiB", "memory", 2**-20),
)


@dataclass(frozen=True)
class Point:
    """One generation: `batch` prompts of `width` tokens, then `steps` steps.

    x            the place on the curve
    factor_sets  that the rows share evenly; None for those of their clusters
    """

    x: int
    batch: int
    width: int
    steps: int = STEPS
    factor_sets: int | None = None


def points(curve: CurveName, max_positions: int, largest: int | None = None) -> list[Point]:
    """Return the points of a curve that a model has positions for.

    largest  the largest x; None for all

    The last length leaves room for the steps: it is as near to the model's positions as fits.
    """
    room = max_positions - STEPS - 1
    width = min(PAST, room)
    if curve is CurveName.BATCH:
        found = [Point(batch, batch, width) for batch in BATCHES]
    elif curve is CurveName.LENGTH:
        widths = dict.fromkeys(min(length, room) for length in LENGTHS)
        found = [Point(length, 1, length) for length in widths]
    else:
        found = [Point(count, max(BATCHES), width, factor_sets=count) for count in BATCHES]
    return [point for point in found if largest is None or point.x <= largest]


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


@dataclass(frozen=True)
class Plan:
    """What is measured.

    engines  by the names that `open_peers` has, beside the bundle
    rounds   samples per engine and point, fewer where one takes long
    largest  the largest x of every curve; None for all points
    """

    threads: int
    curves: Sequence[CurveName]
    engines: Sequence[str]
    rounds: int
    largest: int | None = None


def measure_growth(bundle: Path, reference: Path, plan: Plan, report: Progress) -> Growth:
    """Start a worker per engine and measure the curves.

    Raises InputError if the bundle or its checkpoint cannot be opened.
    """
    manifest = open_bundle(bundle).manifest
    measured: list[Measured] = []
    failed: dict[str, str] = {}
    with ExitStack() as running:
        workers = []
        for done, name in enumerate(["bundle", *plan.engines]):
            report("start engines", done, 1 + len(plan.engines))
            worker = running.enter_context(_worker(bundle, reference, name, plan.threads))
            opened = worker.read()
            worker.name = opened.get("name", name)
            if "error" in opened and name == "bundle":
                raise InputError(f"the bundle cannot be measured: {opened['error']}")
            if "error" in opened:
                failed[name] = opened["error"]
            else:
                workers.append(worker)
        for curve in plan.curves:
            taking_part = [worker for worker in workers if curve != "factor_sets" or worker.name == "bundle"]
            todo = points(curve, manifest.model.max_positions, plan.largest)
            for done, point in enumerate(todo):
                report(curve, done, len(todo))
                found = _measure_point(taking_part, point, plan.rounds)
                for worker in list(taking_part):
                    samples = found[worker.name]
                    if isinstance(samples, str):
                        failed[f"{worker.name}, {curve} {point.x}"] = samples
                        taking_part.remove(worker)
                    else:
                        measured.append(_median(curve, worker.name, point.x, samples))
            report(curve, len(todo), len(todo))
    return Growth(describe_machine(), manifest.precision, plan.threads, measured, failed)


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
    """A running growth_worker.py."""

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
    command = [sys.executable, "-m", "benchmarks.growth_worker", str(bundle), str(reference), engine,
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


def curve_sheet(measured: Sequence[Measured], curve: CurveName, attribute: str) -> Sheet:
    """Return one figure of a curve: a row per point, a column per engine."""
    name, _, factor = next(figure for figure in FIGURES if figure[1] == attribute)
    own = [one for one in measured if one.curve == curve]
    engines = list(dict.fromkeys(one.engine for one in own))
    values = {(one.x, one.engine): f"{getattr(one, attribute) * factor:.1f}" for one in own}
    rows = [[str(x), *(values.get((x, engine), "") for engine in engines)] for x in dict.fromkeys(o.x for o in own)]
    return Sheet([AXES[curve], *engines], rows, title=f"{TITLES[curve]}: {name}")


def sheets(growth: Growth) -> list[Sheet]:
    """Return the tables of all curves that were measured, then of what failed."""
    curves = [curve for curve in CURVES if any(one.curve == curve for one in growth.measured)]
    found = [curve_sheet(growth.measured, curve, attribute) for curve in curves for _, attribute, _ in FIGURES]
    missing = Sheet(["not measured", "why"], [[name, reason] for name, reason in growth.failed.items()])
    return found + [missing] * bool(growth.failed)


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    reference: Annotated[Path, typer.Option(help="The checkpoint that the bundle was exported from.")],
    curve: Annotated[list[CurveName] | None, typer.Option(help="Curves to measure; default: all.")] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Engines to compare with, by name; default: all but torch.compile.")
    ] = None,
    largest: Annotated[int | None, typer.Option(min=1, help="Leave out larger points of every curve.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each engine at each point.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every engine; default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON to this file.")] = None,
) -> None:
    """Measure first tokens, steps and memory over batch, length and factor sets."""
    console.check_output(json_file)
    engines = default_engines(open_bundle(bundle).manifest.precision) if engine is None else engine
    with console.progress() as progress:
        plan = Plan(threads or os.cpu_count() or 1, curve or CURVES, engines, rounds, largest)
        growth = measure_growth(bundle, reference, plan, progress)
    console.show(*sheets(growth))
    if json_file:
        console.write_json(asdict(growth), json_file)


def default_engines(precision: str) -> list[str]:
    """Return the names of the engines that compile nothing for each new shape."""
    llama = f"llama.cpp {LLAMA_TYPES.get(precision, 'F32')}"
    others = [] if precision == "int4" else [f"CTranslate2 {precision}"]
    return ["PyTorch eager fp32", *others, f"OpenVINO {precision}", llama]


if __name__ == "__main__":
    console.run(main)
