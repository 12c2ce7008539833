"""`python -m chameleon_deploy.bench`: measure a bundle against the PyTorch reference and other engines in one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from chameleon_deploy.bench import report
from chameleon_deploy.bench.run import CaseName, Plan, run
from chameleon_deploy.bench.timing import MAX_EXTRA_ROUNDS
from chameleon_deploy.contract.bundle import Precision
from chameleon_deploy.errors import CheckFailedError, InputError
from chameleon_deploy.terminal import console

if TYPE_CHECKING:
    from chameleon_deploy.reference.checkpoint import Checkpoint

WINDOW = 256  # tokens of a text that the quality is measured on


def main(
    bundle: Annotated[
        str | None, typer.Argument(help="Bundle directory, or the URL of one: s3://, gs://, hf:// or https://.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="The checkpoint that the bundle was exported from.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Instead of a bundle: a base model to export with random factors, for this run only; smollm2, or what "
            "train --base takes."
        ),
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="Precision to export --model in; default: fp32.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every engine; default: all cores.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes of generation.")] = None,
    width: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per engine; up to three times as many if noisy.")] = 7,
    engine: Annotated[
        list[str] | None, typer.Option(help="Compare only with engines whose name begins with this, such as OpenVINO.")
    ] = None,
    case: Annotated[list[CaseName] | None, typer.Option(help="Time only this; repeatable; default: all.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to measure the quality on; default: Python's documentation.")
    ] = None,
    windows: Annotated[int, typer.Option(min=0, help="Windows of 256 tokens of it; 0 measures speed only.")] = 24,
    smoke: Annotated[bool, typer.Option(help="Few and short samples without foreign engines, for CI.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
) -> None:
    """Time a bundle, its reference and other engines in turn and compare their quality. Exit 1 if a result is wrong."""
    from chameleon_deploy.bench.quality import text_windows

    console.check_output(json_file, html_file)
    threads = threads or os.cpu_count() or 1
    batch_sizes = batch or ([1, 8] if smoke else [1, 8, 32])
    if smoke:
        width, tokens, rounds, windows = min(width, 32), min(tokens, 9), min(rounds, 3), min(windows, 2)
    directory = console.bundle_path(bundle) if bundle else None
    name = model or (directory.name if directory else "")
    page = report.new_page(name) if html_file else None  # created first, in case that plots cannot be drawn
    with console.progress() as progress, _opened(directory, reference, base, model, precision) as (path, checkpoint):
        read = text_windows(checkpoint.trunk, text or [], windows, WINDOW) if windows else []
        plan = Plan(threads, batch_sizes, width, tokens, rounds, 0 if smoke else MAX_EXTRA_ROUNDS, not smoke,
                    engine or [], read, case or tuple(CaseName))  # fmt: skip
        measured = run(path, checkpoint, plan, progress)
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


@contextmanager
def _opened(
    bundle: Path | None, reference: Path | None, base: str | None, model: str | None, precision: Precision | None
) -> Iterator[tuple[Path, Checkpoint]]:
    """Yield a bundle and its checkpoint: those that exist, or a base model's, which are deleted at the end.

    Raises InputError for options that do not go together, and what loading or exporting raises.
    """
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.random import untrained_checkpoint

    if model is None:
        if bundle is None or reference is None:
            raise InputError("pass a bundle with --reference CHECKPOINT, or --model NAME")
        if precision is not None:
            raise InputError("--precision goes with --model: a bundle has its precision")
        yield bundle, load_checkpoint(reference, base)
        return
    if bundle or reference or base:
        raise InputError("--model exports a bundle of its own: pass no bundle, --reference or --base with it")
    with TemporaryDirectory() as directory:
        untrained_checkpoint(Path(directory, "checkpoint"), model)
        checkpoint = load_checkpoint(Path(directory, "checkpoint"))
        export_bundle(checkpoint, Path(directory, "bundle"), precision=precision or "fp32")
        yield Path(directory, "bundle"), checkpoint


if __name__ == "__main__":
    console.run(main)
