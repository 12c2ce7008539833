"""`python -m chameleon_deploy.bench`: measure a bundle against the PyTorch reference and other engines in one run."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy import console
from chameleon_deploy.bench import report
from chameleon_deploy.bench.run import run
from chameleon_deploy.bench.timing import MAX_EXTRA_ROUNDS
from chameleon_deploy.console import CheckFailedError


def main(
    bundle: console.BundleArgument,
    reference: Annotated[Path, typer.Option(help="The checkpoint that the bundle was exported from.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every engine; default: all cores.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes of generation.")] = None,
    width: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per engine; up to three times as many if noisy.")] = 7,
    smoke: Annotated[bool, typer.Option(help="Few and short samples without foreign engines, for CI.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
) -> None:
    """Time a bundle, its reference and other engines in turn. Exit 1 if a result is wrong."""
    from chameleon_deploy.reference.checkpoint import load_checkpoint

    console.check_output(json_file, html_file)
    directory = console.bundle_path(bundle)
    page = report.new_page(directory) if html_file else None  # created first, in case that plots cannot be drawn
    checkpoint = load_checkpoint(reference, base)
    threads = threads or os.cpu_count() or 1
    batch_sizes = batch or ([1, 8] if smoke else [1, 8, 32])
    if smoke:
        width, tokens, rounds = min(width, 32), min(tokens, 9), min(rounds, 3)
    with console.progress() as progress:
        measured = run(directory, checkpoint, threads, batch_sizes, width, tokens, rounds, progress,
                       0 if smoke else MAX_EXTRA_ROUNDS, foreign=not smoke)  # fmt: skip
    report.print_tables(measured)
    if json_file:
        console.write_json(asdict(measured), json_file)
    if page and html_file:
        report.fill(page, measured)
        page.write(html_file)
    wrong = [
        f"{timing.part.name}: {name} deviates by {timing.deviations[name]:.2g}, allowed is {timing.bounds[name]:g}"
        for timing in measured.timings
        for name in timing.wrong
    ]
    if wrong:
        raise CheckFailedError("results differ from the reference: " + "; ".join(wrong))


if __name__ == "__main__":
    console.run(main)
