"""Measures a pretrained model beside other engines, in several precisions: the tables and the curves of docs/lab.

    python -m benchmarks.pretrained --text wikitext-2/valid.txt
    python -m benchmarks.pretrained --base models/qwen2.5-coder-0.5b.gguf --precision int8 --precision int4

Allow two hours on an idle machine, for a larger model more. What a step makes stays in `--work`, and a step whose file
is there is not repeated. Weights of a GGUF file lie on its own grid already: `benchmarks.off_grid` writes a base on
which engines are compared fairly.
"""

from __future__ import annotations

import itertools
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
# Engines by precision; PyTorch in float32 takes its turns beside the bundle in float32 alone.
QUANTISED = ("CTranslate2", "OpenVINO", "llama.cpp")
ENGINES = {"fp32": ("PyTorch eager", "torch.compile", *QUANTISED)}
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
    rounds: Annotated[int, typer.Option(min=1, help="Samples per engine; up to three times as many if noisy.")] = 7,
    largest: Annotated[int | None, typer.Option(min=1, help="Leave out larger points of every curve.")] = None,
) -> None:
    """Export, measure and print the tables; then the curves, to docs/lab/growth, of a base with a path to --work."""
    name, precisions = Path(base).stem if Path(base).exists() else base, precision or PRECISIONS
    checkpoint = work / name
    step(checkpoint, "chameleon_deploy.reference.random", "--base", base, "--out", checkpoint)
    for one in precisions:
        step(of(work, name, one), "chameleon_deploy.export", checkpoint, "--out", of(work, name, one),
             "--precision", one, "--no-verify")  # fmt: skip
    texts = [word for file in text or () for word in ("--text", file)]
    kinds: dict[str, tuple[object, ...]] = {"steps": ("--batch", 1, "--batch", 8, "--batch", 32, "--tokens", 17)}
    kinds |= {kind: ("--batch", 1, *how) for kind, how in LLAMA_BENCH.items()}
    kinds = {kind: ("--case", "generation", "--windows", 0, *how) for kind, how in kinds.items()}
    kinds["quality"] = ("--case", "scoring", *texts)
    figures: dict[str, list[Path]] = {}
    for kind, how in kinds.items():
        for one in precisions:
            engines = [word for engine in ENGINES.get(one, QUANTISED) for word in ("--engine", engine)]
            figures.setdefault(kind, []).append(file := work / f"bench-{name}-{one}-{kind}.json")
            step(file, "chameleon_deploy.bench", of(work, name, one), "--reference", checkpoint, "--threads", threads,
                 "--rounds", rounds, *how, *engines, "--json", file)  # fmt: skip
    for one in precisions:
        figures.setdefault("loading", []).append(file := work / f"loading-{name}-{one}.json")
        step(file, "benchmarks.loading", of(work, name, one), "--reference", checkpoint, "--threads", threads,
             "--json", file)  # fmt: skip
    tables.pretrained(figures["quality"] + figures["steps"])
    tables.headline(figures)
    curves, limit = [], ("--largest", largest) if largest else ()
    for curve, one in itertools.product(CURVES, precisions):
        curves.append(file := work / f"growth-{name}-{one}-{curve}.json")
        step(file, "benchmarks.growth", of(work, name, one), "--reference", checkpoint, "--threads", threads,
             "--curve", curve, *limit, "--json", file)  # fmt: skip
    growth_plots.main(work / "growth" if Path(base).exists() else CURVES_OF, curves)


def of(work: Path, name: str, precision: str) -> Path:
    """Return where the bundle of a model is."""
    return work / f"{name}-{precision}"


def step(made: Path, module: str, *arguments: object) -> None:
    """Run a command that makes a file or directory, unless it is there. Raises CheckFailedError."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if not made.exists() and subprocess.run(command, check=False).returncode:  # noqa: S603  (our own code)
        raise CheckFailedError(f"{module} did not make {made}")


if __name__ == "__main__":
    console.run(main)
