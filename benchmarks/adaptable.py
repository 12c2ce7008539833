"""Tokens per second of a bundle that takes adapters, beside a plain bundle of the same base.

    python -m chameleon_deploy.export BASE --adaptable all --max-rank 16 --precision int8 --out ADAPTABLE
    python -m chameleon_deploy.export BASE --precision int8 --out PLAIN
    python -m benchmarks.adaptable ADAPTABLE PLAIN --threads 2

The adapters are random, of the same rank on all layers that the bundle can adapt. Every round times the plain bundle
and each case of the other; figures are medians of the rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

import chameleon_deploy
from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.contract.adapter_file import write_adapter
from chameleon_deploy.errors import InputError
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

Rows = Sequence[Sequence[int]]
Choices = Sequence[str | None]  # an adapter for each row
PLAIN = "a plain bundle"


def cases(names: Sequence[str], batch: int) -> dict[str, Choices]:
    """Return the adapters of the rows in each case."""
    return {
        "no adapter": [None] * batch,
        "one adapter in all rows": [names[0]] * batch,
        "one adapter in half of the rows": [names[0] if row % 2 else None for row in range(batch)],
        f"{len(names)} adapters in turn": [names[row % len(names)] for row in range(batch)],
    }


def load_random(runtime: Runtime, count: int, rank: int) -> list[str]:
    """Load adapters of random factors. Raises InputError for a bundle that takes none."""
    spec, random = runtime.manifest.adaptation, np.random.default_rng(0)
    if not spec.targets:
        raise InputError(f"{runtime.bundle.path} takes no adapters: export it with --adaptable")
    names = [f"adapter{i}" for i in range(count)]
    with TemporaryDirectory() as directory:
        for name in names:
            file = Path(directory) / f"{name}.safetensors"
            widths = spec.factor_widths.items()
            write_adapter(file, {n: random.normal(0, 0.01, (rank, w)).astype(np.float32) for n, w in widths}, spec)
            runtime.load_adapter(name, file)
    return names


def tokens_per_second(runtime: Runtime, rows: Rows, adapters: Choices | None, new_tokens: int) -> float:
    begin = time.perf_counter()
    runtime.generate(rows, adapters=adapters, max_new_tokens=new_tokens, sampling=Sampling(ignore_eos=True))
    return len(rows) * new_tokens / (time.perf_counter() - begin)


def measure(
    adaptable: Runtime, plain: Runtime, rows: Rows, chosen: Mapping[str, Choices], new_tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Return tokens per second in each round, of the plain bundle and of each case."""
    found: dict[str, list[float]] = {name: [] for name in (PLAIN, *chosen)}
    for timed in range(-1, rounds):  # the first round is not counted
        for name, speeds in found.items():
            runtime, adapters = (plain, None) if name == PLAIN else (adaptable, chosen[name])
            speed = tokens_per_second(runtime, rows, adapters, new_tokens)
            if timed >= 0:
                speeds.append(speed)
    return found


def main(
    adaptable: Annotated[Path, typer.Argument(help="Bundle directory, exported with --adaptable.")],
    plain: Annotated[Path, typer.Argument(help="Bundle directory of the same base, exported without.")],
    adapters: Annotated[int, typer.Option(min=2, help="Random adapters, which take turns in the last case.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    past: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
) -> None:
    """Time generation with a bundle that takes adapters and with a plain one."""
    one, other = chameleon_deploy.load(adaptable, threads=threads), chameleon_deploy.load(plain, threads=threads)
    chosen = cases(load_random(one, adapters, rank), batch)
    vocab_size = one.manifest.model.vocab_size
    rows: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size, (batch, past)).tolist()
    found = measure(one, other, rows, chosen, tokens, rounds)
    table = []
    for name, speeds in found.items():
        low, middle, high = np.quantile([a / b for a, b in zip(speeds, found[PLAIN], strict=True)], (0.25, 0.5, 0.75))
        table.append([name, f"{median(speeds):.0f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    layers = sum(target.name != "lm_head" for target in one.manifest.adaptation.targets)
    caption = f"{batch} rows of {past} tokens, {tokens} new ones; rank {rank} on {layers} layers; {threads} threads"
    console.show(Sheet(["", "tokens/s", "x plain", "quartiles"], table, caption=caption))


if __name__ == "__main__":
    console.run(main)
