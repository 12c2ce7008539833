"""`python -m chameleon_deploy.bench`: measure a bundle against the PyTorch reference."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from chameleon_deploy import console
from chameleon_deploy.console import CheckFailedError
from chameleon_deploy.measurement import MAX_EXTRA_ROUNDS, LoadFigures, Timing, measure, measure_load

if TYPE_CHECKING:
    from chameleon_deploy.ceilings import Ceilings
    from chameleon_deploy.reference.checkpoint import Checkpoint

TOLERANCE = 5e-4  # of logits and log-probabilities, as in `verify`


@dataclass(frozen=True)
class Benchmark:
    """Everything that one run measured."""

    threads: int
    weights_bytes: int
    ceilings: Ceilings
    load: LoadFigures
    timings: list[Timing]
    cost_split: dict[str, float]  # seconds of the parts of one generation


def timing_table(timings: list[Timing]) -> Table:
    """A row per case: the bundle's time, its share of the floor, and how many times faster it is than the others."""
    others = list(dict.fromkeys(name for timing in timings for name in timing.ratios))
    table = Table("", "bundle", "of the floor", *(f"x {name}" for name in others), "spread", "rounds", "max difference")
    table.caption = "x: how many times faster the bundle is than each other engine"
    for timing in timings:
        seconds = timing.seconds["bundle"]
        ratios = (f"{timing.ratios[name]:.3f}" if name in timing.ratios else "" for name in others)
        table.add_row(
            timing.name,
            f"{seconds / timing.units * 1e3:.3f} ms/{timing.unit}",
            f"{timing.floor / seconds:.0%}",
            *ratios,
            f"{max(timing.spread.values()):.0%}",
            str(timing.rounds),
            f"{timing.difference:.1e}",
        )
    return table


def split_table(cost_split: dict[str, float]) -> Table:
    table = Table("part of one generation, batch 8", "ms", "share")
    total = sum(cost_split.values())
    for name, seconds in sorted(cost_split.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}")
    return table


def run(
    bundle: Path, checkpoint: Checkpoint, threads: int, batch_sizes: Sequence[int], width: int, steps: int, rounds: int,
    report: Any, max_extra_rounds: int = MAX_EXTRA_ROUNDS,
) -> Benchmark:  # fmt: skip
    """Load, ceilings, all timings and the cost split, in this order."""
    import chameleon_deploy
    from chameleon_deploy import workloads
    from chameleon_deploy.ceilings import measure_ceilings

    loading = measure_load(bundle, threads, min(rounds, 3))
    ceilings = measure_ceilings(threads)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    width = min(width, runtime.manifest.model.max_positions - steps)
    rows = workloads.text_rows(checkpoint, max(8, *batch_sizes), width)
    cases = [
        workloads.scoring(runtime, checkpoint, rows[:8]),
        workloads.prefill(runtime, checkpoint, rows[:1]),
        workloads.prefill(runtime, checkpoint, rows[:8]),
    ]
    cases += [workloads.decoding(runtime, checkpoint, rows[:batch], steps) for batch in batch_sizes]
    return Benchmark(
        threads=threads,
        weights_bytes=runtime.manifest.files[runtime.manifest.token_embedding.file].size,
        ceilings=ceilings,
        load=loading,
        timings=[measure(case, ceilings, rounds, report, max_extra_rounds) for case in cases],
        cost_split=workloads.cost_split(runtime, checkpoint, rows[:8], steps),
    )


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    reference: Annotated[Path, typer.Option(help="The checkpoint that the bundle was exported from.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoint's own reference has moved.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of both engines; all cores unless given.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes to decode at.")] = None,
    width: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps per sample.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per engine, doubled or tripled where they scatter.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time a bundle, its reference and the bundle used otherwise in turn. Exit 1 when results differ."""
    from chameleon_deploy.reference.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(reference, base)
    threads = threads or os.cpu_count() or 1
    with console.progress() as report:
        measured = run(bundle, checkpoint, threads, batch or [1, 8, 32], width, steps, rounds, report)
    console.stdout.print(timing_table(measured.timings))
    console.stdout.print(split_table(measured.cost_split))
    load, ceilings = measured.load, measured.ceilings
    console.stdout.print(
        f"{threads} threads, ceilings {ceilings.bytes_per_second / 1e9:.1f} GB/s reading and "
        f"{ceilings.flops_per_second / 1e9:.0f} GFLOP/s. Loading in a fresh process: {load.seconds:.2f} s, "
        f"{load.resident / 1e6:.0f} MB resident ({load.resident / measured.weights_bytes:.2f} x the weights), "
        f"{load.resident_after_generating / 1e6:.0f} MB after generating, peak {load.peak / 1e6:.0f} MB"
    )
    if json_file:
        record = asdict(measured)
        for timing, entry in zip(measured.timings, record["timings"], strict=True):
            entry["ratios"] = timing.ratios
        json_file.write_text(json.dumps(record, indent=2) + "\n")
    wrong = [t.name for t in measured.timings if not t.difference <= TOLERANCE]
    if wrong:
        raise CheckFailedError(f"results differ by more than {TOLERANCE:g}: {', '.join(wrong)}")


if __name__ == "__main__":
    console.run(main)
