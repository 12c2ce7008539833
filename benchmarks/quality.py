"""How far bundles of a base and other engines' quantisations of the same weights lie from PyTorch's logits in float32.

    python -m benchmarks.off_grid MODEL --out BASE
    python -m chameleon_deploy.export BASE --precision int4 --no-verify --out BUNDLE
    python -m benchmarks.quality BASE --bundle BUNDLE --llama-cpp Q4_K_M --openvino int4 --text wikitext-2/valid.txt

Weights that an engine's own format rounded before round again without an error, so take a base off every grid.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import chameleon_deploy
from chameleon_deploy.bench.peers import Peer, reason
from chameleon_deploy.bench.peers.bundle import Bundle
from chameleon_deploy.bench.peers.gguf_writer import write_gguf
from chameleon_deploy.bench.peers.llama_cpp import F32, LlamaCpp
from chameleon_deploy.bench.peers.openvino import OpenVINO
from chameleon_deploy.bench.peers.own_process import OwnProcess
from chameleon_deploy.bench.quality import Quality, measure_quality, text_windows
from chameleon_deploy.errors import CheckFailedError, DependencyError
from chameleon_deploy.reference.model import Trunk, load_trunk
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet


def open_peers(
    trunk: Trunk, bundles: list[Path], mixes: list[str], precisions: list[str], threads: int, directory: Path
) -> Iterator[Peer]:
    """Open the bundles, llama.cpp with the base in each mix of types, and OpenVINO in each precision."""
    for bundle in bundles:
        runtime = chameleon_deploy.load(bundle, threads=threads)
        yield Bundle(runtime, f"bundle {runtime.manifest.precision}")
    if mixes:
        write_gguf(trunk, file := directory / "base.gguf", F32)
    for mix in mixes:
        yield OwnProcess(partial(LlamaCpp, mix=mix), file, "int8" if mix == "Q8_0" else "int4", threads)
    for precision in precisions:
        (place := directory / precision).mkdir()
        yield OpenVINO(trunk, precision, threads, place)


def main(
    base: Annotated[Path, typer.Argument(help="A directory in Hugging Face format, or a GGUF file.")],
    bundle: Annotated[list[Path] | None, typer.Option(help="A bundle of it. Repeatable.")] = None,
    llama_cpp: Annotated[
        list[str] | None, typer.Option(help="A mix of types that llama.cpp quantises the base to. Repeatable.")
    ] = None,
    openvino: Annotated[list[str] | None, typer.Option(help="A precision of OpenVINO. Repeatable.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Default: Python's documentation. Repeatable.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 24,
    width: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 2,
) -> None:
    """Measure how near engines are to the base's logits in float32. Exit 1 if one fails."""
    trunk = load_trunk(base)
    ids = text_windows(trunk, text or [], windows, width)
    with tempfile.TemporaryDirectory() as directory:
        try:
            peers = list(open_peers(trunk, bundle or [], llama_cpp or [], openvino or [], threads, Path(directory)))
        except ImportError as error:
            raise DependencyError(reason(error)) from error
        with console.progress() as report:
            read = measure_quality(peers, trunk, ids, report)
    rows = [row(name, quality) for name, quality in read.items() if isinstance(quality, Quality)]
    caption = f"{windows} windows of {len(ids[0])} tokens, " + ", ".join(describe_machine().values())
    heads = ["engine", "mean KL", "99.9th percentile", "same best token", "perplexity", "MB"]
    console.show(Sheet(heads, rows, f"Quality beside {base.name} in float32", caption))
    if failed := [f"{name}: {why}" for name, why in read.items() if isinstance(why, str)]:
        raise CheckFailedError("; ".join(failed))


def row(name: str, quality: Quality) -> list[str]:
    more = 100 * (quality.perplexity / quality.reference_perplexity - 1)
    perplexity = f"{quality.perplexity:.3f} ({more:+.2f} %)"
    figures = (f"{quality.mean_kl:.2e}", f"{quality.p999_kl:.2e}", f"{quality.top1:.3f}", perplexity)
    return [name, *figures, f"{quality.size / 1e6:.0f}"]


if __name__ == "__main__":
    console.run(main)
