"""Measures a pretrained model beside other engines, in several precisions: the tables and the curves of docs/lab.

    python -m benchmarks.pretrained --text wikitext-2/valid.txt
    python -m benchmarks.pretrained --base models/qwen2.5-coder-0.5b.gguf --precision int8 --precision int4

Allow two hours on an idle machine, for a larger model more. What a step makes stays in `--work`, and a step whose file
is there is not repeated. Weights of a GGUF file lie on its own grid already: `benchmarks.off_grid` writes a base on
which engines are compared fairly.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import growth_plots, tables
from benchmarks.growth import CURVES
from chameleon_deploy.errors import CheckFailedError
from chameleon_deploy.terminal import console

PRECISIONS = ("fp32", "int8")
# llama-bench's own terms: 512 tokens of a prompt, and 128 tokens after an empty one, of one row.
LLAMA_BENCH = {"pp512": ("--width", 512, "--tokens", 2), "tg128": ("--width", 2, "--tokens", 129)}
CURVES_OF = Path("docs/lab/growth")


def main(
    work: Annotated[Path, typer.Option(help="Directory of bundles and figures.")] = Path("models/bench"),
    text: Annotated[
        list[Path] | None, typer.Option(help="Text to measure the quality on; default: Python's documentation.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 2,
    base: Annotated[str, typer.Option(help="A directory, a GGUF file, or the short name of a model.")] = "smollm2",
    precision: Annotated[list[str] | None, typer.Option(help="Repeatable; default: fp32 and int8.")] = None,
) -> None:
    """Export, measure and print the tables; the curves go to docs/lab/growth, of a base with a path to --work."""
    name = Path(base).stem if Path(base).exists() else base
    checkpoint = work / name
    step(checkpoint, "chameleon_deploy.reference.random", "--base", base, "--out", checkpoint)
    speed, llama_bench, curves = list[Path](), dict[str, list[Path]](), []
    for one in precision or PRECISIONS:
        bundle = work / f"{name}-{one}"
        step(bundle, "chameleon_deploy.export", checkpoint, "--out", bundle, "--precision", one, "--no-verify")
        measured = (bundle, "--reference", checkpoint, "--threads", threads)

        def figures(kind: str, *how: object, bundle: Path = bundle, measured: Sequence[object] = measured) -> Path:
            file = work / f"bench-{bundle.name}-{kind}.json"
            step(file, "chameleon_deploy.bench", *measured, *how, "--json", file)
            return file

        texts = [word for file in text or () for word in ("--text", file)]
        speed += [figures("8", "--batch", 1, "--batch", 8, *texts), figures("32", "--batch", 32, "--windows", 0)]
        for kind, how in LLAMA_BENCH.items():
            llama_bench.setdefault(kind, []).append(figures(kind, "--batch", 1, *how, "--windows", 0))
        for curve in CURVES:
            file = work / f"growth-{bundle.name}-{curve}.json"
            step(file, "benchmarks.growth", *measured, "--curve", curve, "--json", file)
            curves.append(file)
    growth_plots.main(work / "growth" if Path(base).exists() else CURVES_OF, curves)
    tables.pretrained(speed)
    tables.llama_bench(llama_bench["pp512"], llama_bench["tg128"])


def step(made: Path, module: str, *arguments: object) -> None:
    """Run a command that makes a file or directory, unless it is there. Raises CheckFailedError."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if not made.exists() and subprocess.run(command, check=False).returncode:  # noqa: S603  (our own code)
        raise CheckFailedError(f"{module} did not make {made}")


if __name__ == "__main__":
    console.run(main)
