"""`python -m chameleon_deploy.bench`: measure a bundle against the PyTorch reference and other engines, in one run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from chameleon_deploy import console
from chameleon_deploy.bundle import open_bundle
from chameleon_deploy.console import CheckFailedError
from chameleon_deploy.footprint import Footprint, measure_footprint
from chameleon_deploy.measurement import MAX_EXTRA_ROUNDS, Timing, measure

if TYPE_CHECKING:
    from chameleon_deploy.ceilings import Ceilings
    from chameleon_deploy.reference.checkpoint import Checkpoint


@dataclass(frozen=True)
class Benchmark:
    """Everything that one run measured.

    machine     the processor and the versions of all engines
    ceilings    of every round of every timing
    cost_split  seconds of the parts of one generation, batch 8
    missing     engines that could not be had here, and why
    """

    machine: dict[str, str]
    precision: str
    threads: int
    weights_bytes: int
    ceilings: list[Ceilings]
    footprint: Footprint
    timings: list[Timing]
    cost_split: dict[str, float]
    missing: dict[str, str]

    @property
    def not_compared(self) -> dict[str, str]:
        """Every engine that is missing, or failed at something, and why."""
        failed = {
            f"{name}, {timing.part.name}": reason for timing in self.timings for name, reason in timing.failed.items()
        }
        return self.missing | failed


def run(
    bundle: Path,
    checkpoint: Checkpoint,
    threads: int,
    batch_sizes: Sequence[int],
    width: int,
    num_tokens: int,
    rounds: int,
    report: Callable[[str, int, int], None],
    max_extra_rounds: int = MAX_EXTRA_ROUNDS,
    foreign: bool = True,
) -> Benchmark:
    """Footprint, all timings and the cost split, in this order.

    width, num_tokens  of every prompt, and how many to generate after it
    foreign            also compare with torch.compile, CTranslate2 and OpenVINO
    """
    import chameleon_deploy
    from chameleon_deploy import workloads
    from chameleon_deploy.ceilings import open_ceilings
    from chameleon_deploy.cost_split import cost_split
    from chameleon_deploy.machine import describe_machine
    from chameleon_deploy.peers import open_peers

    width = min(width, open_bundle(bundle).manifest.model.max_positions - num_tokens)
    report("footprint", 0, 1)
    footprint = measure_footprint(bundle, threads, min(rounds, 3), 8, width, num_tokens)
    report("footprint", 1, 1)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    measure_ceilings = open_ceilings(threads, runtime.manifest.precision)
    ceilings: list[Ceilings] = []

    def now() -> Ceilings:
        ceilings.append(measure_ceilings())
        return ceilings[-1]

    rows = workloads.text_rows(checkpoint, max(8, *batch_sizes), width)
    with TemporaryDirectory() as directory:
        report("convert for other engines", 0, 1)
        peers, missing = open_peers(runtime, checkpoint, threads, Path(directory), foreign)
        report("convert for other engines", 1, 1)
        work = workloads.Workloads(runtime, checkpoint, peers)
        cases = [work.scoring(rows[:8]), work.first_token(rows[0])]
        cases += [work.generation(rows[:batch], num_tokens) for batch in batch_sizes]
        timings = [timing for case in cases for timing in measure(case, now, rounds, report, max_extra_rounds)]
    return Benchmark(
        machine=describe_machine(),
        precision=runtime.manifest.precision,
        threads=threads,
        weights_bytes=sum(spec.size for name, spec in runtime.manifest.files.items() if name.endswith(".bin")),
        ceilings=ceilings,
        footprint=footprint,
        timings=timings,
        cost_split=cost_split(runtime, runtime.tokenizer.decode_batch(rows[:8]), num_tokens),
        missing=missing,
    )


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    reference: Annotated[Path, typer.Option(help="The checkpoint that the bundle was exported from.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoint's own reference has moved.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every engine; all cores unless given.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes to generate at.")] = None,
    width: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per engine, doubled or tripled where they scatter.")] = 7,
    smoke: Annotated[bool, typer.Option(help="Few and short samples without foreign engines, for CI.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
) -> None:
    """Time a bundle, its reference and other engines in turn. Exit 1 when a result is wrong."""
    from chameleon_deploy import bench_report
    from chameleon_deploy.reference.checkpoint import load_checkpoint

    page = bench_report.new_page(bundle) if html_file else None  # first, in case that plots cannot be drawn
    checkpoint = load_checkpoint(reference, base)
    threads = threads or os.cpu_count() or 1
    batch_sizes = batch or ([1, 8] if smoke else [1, 8, 32])
    if smoke:
        width, tokens, rounds = min(width, 32), min(tokens, 9), min(rounds, 3)
    with console.progress() as report:
        measured = run(bundle, checkpoint, threads, batch_sizes, width, tokens, rounds, report,
                       0 if smoke else MAX_EXTRA_ROUNDS, foreign=not smoke)  # fmt: skip
    print_tables(measured)
    if json_file:
        json_file.write_text(json.dumps(asdict(measured), indent=2) + "\n")
    if page and html_file:
        bench_report.fill(page, measured)
        page.write(html_file)
    wrong = [
        f"{timing.part.name}: {name} deviates by {timing.deviations[name]:.2g}, allowed is {timing.bounds[name]:g}"
        for timing in measured.timings
        for name in timing.wrong
    ]
    if wrong:
        raise CheckFailedError("results differ from the reference: " + "; ".join(wrong))


def print_tables(measured: Benchmark) -> None:
    from chameleon_deploy import bench_report

    for grid in (bench_report.timing_grid(measured), bench_report.split_grid(measured),
                 bench_report.missing_grid(measured)):  # fmt: skip
        if grid.rows:
            table = Table(*grid.headers, caption=grid.caption)
            for row in grid.rows:
                table.add_row(*row)
            console.stdout.print(table)
    for line in bench_report.summary(measured):
        console.stdout.print(line)


if __name__ == "__main__":
    console.run(main)
