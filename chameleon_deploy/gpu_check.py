"""`python -m chameleon_deploy.gpu_check`: everything that needs a GPU to be known, in one command of minutes.

Continuous integration has no GPU. This verifies every backend and precision on one, and measures them
against PyTorch on the same device in one interleaved run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from chameleon_deploy import console
from chameleon_deploy.bundle import Bundle, open_bundle
from chameleon_deploy.console import CheckFailedError
from chameleon_deploy.errors import DependencyError, ProviderError

if TYPE_CHECKING:
    from chameleon_deploy.bench.peers import Peer
    from chameleon_deploy.bench.timing import Case, Timing
    from chameleon_deploy.reference.checkpoint import Checkpoint
    from chameleon_deploy.runtime import Runtime
    from chameleon_deploy.verify.gates import Check

Report = Callable[[str, int, int], None]
Open = Callable[[Bundle], "Runtime"]

BATCH_SIZES, WIDTH, NUM_TOKENS, ROUNDS = (1, 8, 32), 128, 33, 5


@dataclass
class BundleFigures:
    """What was found out about one bundle.

    unavailable     why a provider could not be had
    bytes_per_step  that crossed to and from the device in a greedy step at batch 8, by provider
    cost_split      seconds of the parts of a generation at batch 8, by provider
    skipped         what was left out, and why
    """

    bundle: str
    precision: str
    unavailable: dict[str, str] = field(default_factory=dict)
    checks: dict[str, list[Check]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    bytes_per_step: dict[str, dict[str, float]] = field(default_factory=dict)
    cost_split: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_per_second: float = 0.0  # of the device's memory
    skipped: list[str] = field(default_factory=list)

    @property
    def missed(self) -> list[str]:
        """Gates that were missed, and engines whose results are wrong."""
        gates = [
            f"{self.bundle}, {provider}: {check.name}"
            for provider, checks in self.checks.items()
            for check in checks
            if not check.passed
        ]
        return gates + [
            f"{self.bundle}: {timing.part.name}: the results of {name} are wrong"
            for timing in self.timings
            for name in timing.wrong
        ]


def check_bundle(
    bundle: Bundle, checkpoint: Checkpoint, reference: Any, openers: Mapping[str, Open], torch_device: str | None,
    compiled: bool, deadline: float, report: Report,
) -> BundleFigures:  # fmt: skip
    """Verify, then measure, one bundle on every provider that can be had.

    reference     a RowLogits of the checkpoint: what one bundle has computed serves the next
    openers       a runtime of each provider, or the error that says why there is none
    torch_device  where PyTorch runs; None leaves it out
    compiled      whether torch.compile is compared too
    deadline      time.monotonic() after which nothing more is begun; it is listed as skipped
    """
    from chameleon_deploy.bench import gpu_costs
    from chameleon_deploy.bench.ceilings import Ceilings
    from chameleon_deploy.bench.timing import measure
    from chameleon_deploy.bench.workloads import Workloads, text_rows
    from chameleon_deploy.verify import checks as parity
    from chameleon_deploy.verify.run import rows_within, verification_rows

    manifest = bundle.manifest
    limits, figures = manifest.limits, BundleFigures(str(bundle.path), manifest.precision)
    runtimes: dict[str, Runtime] = {}
    for provider, opener in openers.items():
        try:
            runtimes[provider] = opener(bundle)
        except (ProviderError, DependencyError) as error:
            figures.unavailable[provider] = str(error)
    if not runtimes:
        reasons = "; ".join(f"{provider}: {reason}" for provider, reason in figures.unavailable.items())
        raise ProviderError(f"{bundle.path}: no provider of this machine's GPU can be had: {reasons}")

    def in_time(what: str) -> bool:
        if time.monotonic() > deadline:
            figures.skipped.append(f"{what}: out of time")
            return False
        return True

    rows = rows_within(verification_rows(checkpoint, None), limits)
    for provider, runtime in runtimes.items():
        if in_time(f"verifying {provider}"):
            figures.checks[provider] = parity.verify(runtime, reference, rows, True, report)

    first = next(iter(runtimes.values()))
    figures.bytes_per_second = gpu_costs.measure_bandwidth(first)
    ceilings = Ceilings(figures.bytes_per_second, math.inf, "not counted")
    sizes = [size for size in BATCH_SIZES if size <= min(limits.batch, limits.factor_sets)]
    texts = text_rows(checkpoint, max(sizes), min(WIDTH, limits.sequence, limits.past - NUM_TOKENS))
    workloads = Workloads(first, checkpoint, _peers(runtimes, checkpoint, torch_device, compiled, figures.skipped))
    works: dict[str, Callable[[], Case]] = {
        f"generation, batch {size}": partial(workloads.generation, texts[:size], NUM_TOKENS) for size in sizes
    }
    works["scoring"] = partial(workloads.scoring, texts[:8])
    for name, work in works.items():
        if in_time(name):
            timings = measure(work(), lambda: ceilings, ROUNDS, report, max_extra_rounds=1)
            figures.timings += timings
            figures.skipped += [f"{name}: {peer}: {reason}" for peer, reason in timings[0].failed.items()]
    for provider, runtime in runtimes.items():
        if in_time(f"cost split of {provider}"):
            figures.bytes_per_step[provider] = gpu_costs.bytes_per_step(runtime, texts[:8], NUM_TOKENS - 1)
            figures.cost_split[provider] = gpu_costs.cost_split(runtime, texts[:8], NUM_TOKENS)
    return figures


def _peers(
    runtimes: Mapping[str, Runtime], checkpoint: Checkpoint, torch_device: str | None, compiled: bool,
    skipped: list[str],
) -> list[Peer]:  # fmt: skip
    """Every provider, the first without adaptation, and PyTorch."""
    from chameleon_deploy.bench.peers.bundle import Bundle as BundlePeer
    from chameleon_deploy.bench.peers.pytorch_gpu import PyTorchGPU
    from chameleon_deploy.runtime import Runtime

    first = next(iter(runtimes.values()))
    without = BundlePeer(Runtime(first.bundle, first.backend, "none"), "no adaptation")
    without.adapts = False
    peers: list[Peer] = [*(BundlePeer(runtime, provider) for provider, runtime in runtimes.items()), without]
    if torch_device is None:
        skipped.append("PyTorch: this torch has no CUDA")
        return peers
    peers.append(PyTorchGPU(checkpoint, first.mode, first.manifest.precision, torch_device, compiled=False))
    if compiled:
        peers.append(PyTorchGPU(checkpoint, first.mode, first.manifest.precision, torch_device, compiled=True))
    return peers


def tables(figures: BundleFigures) -> Iterator[Table]:
    """What people read of the figures of a bundle."""
    engines = list(dict.fromkeys(name for timing in figures.timings for name in timing.seconds))
    timings = Table("", *engines, "of the floor", "spread",
                    title=f"{figures.bundle}, {figures.precision}: milliseconds per step or token")  # fmt: skip
    for timing in figures.timings:
        cells = [
            f"{timing.seconds[name] / timing.part.units * 1e3:.4f} ({timing.ratios.get(name, 1.0):.2f})"
            if name in timing.seconds
            else ""
            for name in engines
        ]
        timings.add_row(timing.part.name, *cells, f"{timing.share:.0%}",
                        f"{max(timing.spread.values()):.0%}")  # fmt: skip
    timings.caption = (
        f"in brackets: how many times faster the first is; floor: reading at {figures.bytes_per_second / 1e9:.0f} GB/s"
    )
    yield timings
    for provider, parts in figures.cost_split.items():
        split = Table(f"part of a generation of {NUM_TOKENS} tokens, batch 8", "ms",
                      title=f"{provider}, {figures.precision}")  # fmt: skip
        for name, seconds in parts.items():
            split.add_row(name, f"{seconds * 1e3:.3f}")
        crossed = figures.bytes_per_step[provider]
        split.caption = ", ".join(f"{count:.0f} bytes {where}" for where, count in crossed.items()) + " in a step"
        yield split


def main(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles of one checkpoint.")],
    reference: Annotated[Path, typer.Option(help="The checkpoint that they were exported from.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoint's own reference has moved.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compare with torch.compile too.")] = True,
    seconds: Annotated[int, typer.Option(min=1, help="Nothing more is begun after so many.")] = 400,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Verify and measure bundles, one of each precision, on this machine's GPU. Exit 1 when a gate is missed."""
    from chameleon_deploy.runtime.device.cuda import import_cudart

    deadline = time.monotonic() + seconds
    import_cudart()  # raises, in one line, what is missing
    opened = [open_bundle(path) for path in bundles]
    import torch

    from chameleon_deploy import engines
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.inference import RowLogits
    from chameleon_deploy.runtime import Runtime
    from chameleon_deploy.runtime.providers import open_cuda, open_tensorrt

    checkpoint, device = load_checkpoint(reference, base), engines.current_device()
    openers: dict[str, Open] = {
        "tensorrt": lambda bundle: Runtime(bundle, open_tensorrt(bundle)),
        "cuda": lambda bundle: Runtime(bundle, open_cuda(bundle)),
    }
    rows, torch_device = RowLogits(checkpoint), "cuda" if torch.cuda.is_available() else None
    figures: list[BundleFigures] = []
    with console.progress() as report:
        for bundle in opened:
            figures.append(check_bundle(bundle, checkpoint, rows, openers, torch_device, compiled, deadline, report))
            if json_file:  # after each: what has been measured is kept whatever comes
                json_file.write_text(json.dumps(record(asdict(device), figures), indent=2) + "\n")
    for found in figures:
        for table in tables(found):
            console.stdout.print(table)
        for line in (*(f"{p}: {reason}" for p, reason in found.unavailable.items()), *found.skipped):
            console.stdout.print(f"left out: {line}")
    missed = [line for found in figures for line in found.missed]
    if missed:
        raise CheckFailedError(f"{len(missed)} missed: {'; '.join(missed)}")


def record(device: dict[str, str], figures: list[BundleFigures]) -> dict[str, Any]:
    """The content of the JSON file: figures as they are, with `passed` for each check."""
    bundles = []
    for found in figures:
        entry = asdict(found)
        for provider, checks in found.checks.items():
            for check, fields in zip(checks, entry["checks"][provider], strict=True):
                fields["passed"] = check.passed
        bundles.append(entry | {"missed": found.missed})
    return {"device": device, "bundles": bundles}


if __name__ == "__main__":
    console.run(main)
