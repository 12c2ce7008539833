"""`python -m chameleon_deploy.bench`: measure a bundle against the PyTorch reference."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from chameleon_deploy import console
from chameleon_deploy.console import CheckFailedError
from chameleon_deploy.measurement import MAX_EXTRA_ROUNDS, LoadFigures, Timing, measure, measure_load

if TYPE_CHECKING:
    from chameleon_deploy.reference.checkpoint import Checkpoint

TOLERANCE = 5e-4  # of logits and log-probabilities, as in `verify`


def timing_table(timings: list[Timing]) -> Table:
    """A row per case: the bundle's time, and how many times faster it is than each other engine."""
    others = list(dict.fromkeys(name for timing in timings for name in timing.ratios))
    table = Table("", "bundle", *(f"x {name}" for name in others), "spread", "rounds", "max difference")
    for timing in timings:
        seconds = timing.seconds["bundle"] / timing.units
        ratios = (f"{timing.ratios[name]:.3f}" if name in timing.ratios else "" for name in others)
        spread = f"{max(timing.spread.values()):.0%}"
        table.add_row(timing.name, f"{seconds * 1e3:.3f} ms/{timing.unit}", *ratios, spread, str(timing.rounds),
                      f"{timing.difference:.1e}")  # fmt: skip
    return table


def run(
    bundle: Path, checkpoint: Checkpoint, threads: int, batch_sizes: Sequence[int], width: int, steps: int, rounds: int,
    report: Any, max_extra_rounds: int = MAX_EXTRA_ROUNDS,
) -> tuple[list[Timing], LoadFigures, int]:  # fmt: skip
    """All timings, the figures of loading, and the bundle's weights in bytes."""
    import torch

    import chameleon_deploy
    from chameleon_deploy import workloads

    loading = measure_load(bundle, threads, min(rounds, 3))
    torch.set_num_threads(threads)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    width = min(width, runtime.manifest.model.max_positions - steps)
    rows = workloads.text_rows(checkpoint, max(8, *batch_sizes), width)
    cases = [
        workloads.scoring(runtime, checkpoint, rows[:8]),
        workloads.prefill(runtime, checkpoint, rows[:1]),
        workloads.prefill(runtime, checkpoint, rows[:8]),
    ]
    cases += [workloads.decoding(runtime, checkpoint, rows[:batch], steps) for batch in batch_sizes]
    timings = [measure(case, rounds, report, max_extra_rounds) for case in cases]
    return timings, loading, runtime.manifest.files[runtime.manifest.token_embedding.file].size


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
        timings, loading, weights = run(bundle, checkpoint, threads, batch or [1, 8, 32], width, steps, rounds, report)
    console.stdout.print(timing_table(timings))
    console.stdout.print(
        f"{threads} threads. Loading in a fresh process: {loading.seconds:.2f} s, {loading.resident / 1e6:.0f} MB "
        f"resident ({loading.resident / weights:.2f} x the weights), "
        f"{loading.resident_after_generating / 1e6:.0f} MB after generating, peak {loading.peak / 1e6:.0f} MB"
    )
    if json_file:
        record = {"threads": threads, "weights_bytes": weights, "load": asdict(loading),
                  "timings": [{**asdict(t), "ratios": t.ratios} for t in timings]}  # fmt: skip
        json_file.write_text(json.dumps(record, indent=2) + "\n")
    wrong = [t.name for t in timings if not t.difference <= TOLERANCE]
    if wrong:
        raise CheckFailedError(f"results differ by more than {TOLERANCE:g}: {', '.join(wrong)}")


if __name__ == "__main__":
    console.run(main)
