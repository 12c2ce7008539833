"""Measures SmolLM2-135M beside other engines, in fp32 and int8: the tables and the curves of docs/lab.

    python -m benchmarks.pretrained --text wikitext-2/valid.txt

Allow two hours on an idle machine. What a step makes stays in `--work`, and a step whose file is there is not repeated.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import growth_plots, tables
from benchmarks.growth import CURVES
from chameleon_deploy.errors import CheckFailedError
from chameleon_deploy.terminal import console

PRECISIONS = ("fp32", "int8")


def main(
    work: Annotated[Path, typer.Option(help="Directory of bundles and figures.")] = Path("models/bench"),
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to measure the quality on; default: Python's documentation.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 2,
) -> None:
    """Export, measure and print the tables; the curves go to docs/lab/growth."""
    checkpoint = work / "smollm2"
    step(checkpoint, "chameleon_deploy.reference.random", "--base", "smollm2", "--out", checkpoint)
    speed, curves = [], []
    for precision in PRECISIONS:
        bundle = work / f"smollm2-{precision}"
        step(bundle, "chameleon_deploy.export", checkpoint, "--out", bundle, "--precision", precision, "--no-verify")
        measured = (bundle, "--reference", checkpoint, "--threads", threads)
        small, large = (work / f"bench-{precision}-{batch}.json" for batch in (8, 32))
        texts = [word for file in text or () for word in ("--text", file)]
        step(small, "chameleon_deploy.bench", *measured, "--batch", 1, "--batch", 8, *texts, "--json", small)
        step(large, "chameleon_deploy.bench", *measured, "--batch", 32, "--windows", 0, "--json", large)
        speed += [small, large]
        for curve in CURVES:
            file = work / f"growth-{precision}-{curve}.json"
            step(file, "benchmarks.growth", *measured, "--curve", curve, "--json", file)
            curves.append(file)
    growth_plots.main(Path("docs/lab/growth"), curves)
    tables.pretrained(speed)


def step(made: Path, module: str, *arguments: object) -> None:
    """Run a command that makes a file or directory, unless it is there. Raises CheckFailedError."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if not made.exists() and subprocess.run(command, check=False).returncode:  # noqa: S603  (our own code)
        raise CheckFailedError(f"{module} did not make {made}")


if __name__ == "__main__":
    console.run(main)
