"""`python -m chameleon_deploy.bench.growth`: measure how time and memory grow, beside other engines."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.bench.growth import report
from chameleon_deploy.bench.growth.curves import CURVES, CurveName
from chameleon_deploy.bench.growth.run import measure_growth
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.html_page import Page


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
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
) -> None:
    """Measure first tokens, steps and memory over batch, length and factor sets."""
    console.check_output(json_file, html_file)
    page = Page(f"Growth of {bundle.name}", "chameleon-deploy bench.growth") if html_file else None
    engines = default_engines(open_bundle(bundle).manifest.precision) if engine is None else engine
    with console.progress() as progress:
        growth = measure_growth(
            bundle, reference, threads or os.cpu_count() or 1, curve or CURVES, engines, rounds, progress, largest
        )
    report.print_tables(growth)
    if json_file:
        console.write_json(asdict(growth), json_file)
    if page and html_file:
        report.fill(page, growth)
        page.write(html_file)


def default_engines(precision: str) -> list[str]:
    """Return the names of the engines that compile nothing for each new shape."""
    llama = ["llama.cpp Q8_0"] if precision == "int8" else ["llama.cpp F32"]
    return ["PyTorch eager fp32", f"CTranslate2 {precision}", f"OpenVINO {precision}", *llama]


if __name__ == "__main__":
    console.run(main)
