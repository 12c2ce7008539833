"""`python -m chameleon_deploy.bench.gpu_check`: verify and measure every provider and precision on a GPU.

Continuous integration has no GPU. This command takes minutes and compares with PyTorch on the same device in one
interleaved run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chameleon_deploy.contract.bundle import Bundle, open_bundle
from chameleon_deploy.errors import CheckFailedError, DependencyError, ProviderError
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet

if TYPE_CHECKING:
    from chameleon_deploy.bench.peers import Peer
    from chameleon_deploy.bench.timing import Case, Timing
    from chameleon_deploy.reference.checkpoint import Checkpoint
    from chameleon_deploy.reference.inference import RowLogits
    from chameleon_deploy.runtime import Runtime
    from chameleon_deploy.runtime.backend import DeviceBackend
    from chameleon_deploy.verify.gates import Check

Open = Callable[[Bundle], "Runtime"]

BATCH_SIZES, WIDTH, NUM_TOKENS, ROUNDS = (1, 8, 32), 128, 33, 5
COPIES = 5  # of which the fastest gives the bandwidth


@dataclass
class BundleFigures:
    """The figures of one bundle.

    unavailable       why a provider could not be opened
    bytes_per_step    copied to and from the device in a greedy step at batch 8, by provider
    bytes_per_second  the bandwidth of the device's memory
    skipped           what was left out, and why
    """

    bundle: str
    precision: str
    unavailable: dict[str, str] = field(default_factory=dict)
    checks: dict[str, list[Check]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    bytes_per_step: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_per_second: float = 0.0
    skipped: list[str] = field(default_factory=list)

    @property
    def missed(self) -> list[str]:
        """Return the gates that were missed and the engines whose results are wrong."""
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
    bundle: Bundle,
    reference: RowLogits,
    openers: Mapping[str, Open],
    torch_device: str | None,
    compiled: bool,
    deadline: float,
    report: Progress,
) -> BundleFigures:
    """Verify and then measure one bundle on every available provider.

    reference     of the checkpoint; it caches logits from one bundle to the next
    openers       a runtime of each provider, or the error that says why there is none
    torch_device  where PyTorch runs; None leaves it out
    compiled      whether torch.compile is compared too
    deadline      time.monotonic() after which no new part starts; what was left out is listed as skipped
    """
    from chameleon_deploy.bench.timing import measure
    from chameleon_deploy.bench.workloads import Workloads, text_rows
    from chameleon_deploy.verify import checkpoint_checks
    from chameleon_deploy.verify.run import rows_within, verification_rows

    manifest, checkpoint = bundle.manifest, reference.checkpoint
    limits, figures = manifest.limits, BundleFigures(str(bundle.path), manifest.precision)
    runtimes: dict[str, Runtime] = {}
    for provider, opener in openers.items():
        try:
            runtimes[provider] = opener(bundle)
        except (ProviderError, DependencyError) as error:
            figures.unavailable[provider] = str(error)
    if not runtimes:
        reasons = "; ".join(f"{provider}: {reason}" for provider, reason in figures.unavailable.items())
        raise ProviderError(f"{bundle.path}: no GPU provider is available: {reasons}")

    def in_time(what: str) -> bool:
        if time.monotonic() > deadline:
            figures.skipped.append(f"{what}: out of time")
            return False
        return True

    rows = rows_within(verification_rows(checkpoint), limits)
    for provider, runtime in runtimes.items():
        if in_time(f"verifying {provider}"):
            figures.checks[provider] = checkpoint_checks.verify_checkpoint(runtime, reference, rows, True, report)

    first = next(iter(runtimes.values()))
    figures.bytes_per_second = measure_bandwidth(first)
    sizes = [size for size in BATCH_SIZES if size <= min(limits.batch, limits.factor_sets)]
    texts = text_rows(checkpoint, max(sizes), min(WIDTH, limits.sequence, limits.past - NUM_TOKENS))
    workloads = Workloads(first, checkpoint, _peers(runtimes, checkpoint, torch_device, compiled, figures.skipped))
    works: dict[str, Callable[[], Case]] = {
        f"generation, batch {size}": partial(workloads.generation, texts[:size], NUM_TOKENS) for size in sizes
    }
    works["scoring"] = partial(workloads.scoring, texts[:8])
    for name, work in works.items():
        if in_time(name):
            timings = measure(work(), ROUNDS, report, max_extra_rounds=1)
            figures.timings += timings
            figures.skipped += [f"{name}: {peer}: {reason}" for peer, reason in timings[0].failed.items()]
    for provider, runtime in runtimes.items():
        if in_time(f"bytes per step of {provider}"):
            figures.bytes_per_step[provider] = bytes_per_step(runtime, texts[:8], NUM_TOKENS - 1)
    return figures


def _peers(
    runtimes: Mapping[str, Runtime], checkpoint: Checkpoint, torch_device: str | None, compiled: bool,
    skipped: list[str],
) -> list[Peer]:  # fmt: skip
    """Return every provider, the first one without adaptation, and PyTorch."""
    from chameleon_deploy.bench.peers import reason
    from chameleon_deploy.bench.peers.bundle import Bundle as BundlePeer
    from chameleon_deploy.runtime import Runtime

    first = next(iter(runtimes.values()))
    plain = Runtime(first.bundle, first.backend, "none")
    peers: list[Peer] = [
        BundlePeer(runtime, name, device_backend(runtime).device.synchronize)
        for name, runtime in {**runtimes, "no adaptation": plain}.items()
    ]
    if torch_device is None:
        skipped.append("PyTorch: this torch has no CUDA")
        return peers
    try:
        from chameleon_deploy.bench.peers.pytorch_gpu import PyTorchGPU
    except ImportError as error:
        skipped.append(f"PyTorch: {reason(error)}")
        return peers
    precision = first.manifest.precision
    return peers + [
        PyTorchGPU(checkpoint, first.mode, precision, torch_device, compile_it)
        for compile_it in ((False, True) if compiled else (False,))
    ]


def bytes_per_step(runtime: Runtime, rows: Sequence[Sequence[int]], steps: int) -> dict[str, float]:
    """Return the bytes copied in a greedy step, counted by the device, without the first step, which binds the
    tensors.
    """
    backend, factors = device_backend(runtime), runtime.adapt(rows, on_device=True).factors
    device, decoder = backend.device, backend.decoder
    logits, cache = decoder.prefill(rows, factors, len(rows[0]) + steps + 1)
    logits = decoder.step(logits.greedy(), factors, cache)
    uploaded, downloaded = device.uploaded, device.downloaded
    for _ in range(steps):
        logits = decoder.step(logits.greedy(), factors, cache)
    return {"to device": (device.uploaded - uploaded) / steps, "to host": (device.downloaded - downloaded) / steps}


def measure_bandwidth(runtime: Runtime, size: int = 2**30) -> float:
    """Return the bytes per second that the device reads and writes in a large copy: the best of several."""
    from chameleon_deploy.bench.timing import median_seconds

    device = device_backend(runtime).device
    source, target = device.zeros((size // 4,), "float32"), device.zeros((size // 4,), "float32")

    def work() -> None:
        for _ in range(8):
            device.copy(target.address, size, source.address, size, size, 1)
        device.synchronize()

    fastest = math.inf
    for _ in range(COPIES):
        fastest = min(fastest, median_seconds(work, 1))
    return 8 * 2 * size / fastest


def device_backend(runtime: Runtime) -> DeviceBackend:
    """Return the device backend. Raises TypeError for a runtime on the CPU."""
    from chameleon_deploy.runtime.backend import DeviceBackend

    backend = runtime.backend
    if not isinstance(backend, DeviceBackend):
        raise TypeError(f"provider {runtime.provider} does not run on a device")
    return backend


def sheets(figures: BundleFigures) -> Iterator[Sheet]:
    """Return the figures of a bundle as tables."""
    engines = list(dict.fromkeys(name for timing in figures.timings for name in timing.seconds))
    rows = [
        [
            timing.part.name,
            *(
                f"{timing.seconds[name] / timing.part.units * 1e3:.4f} ({timing.ratios.get(name, 1.0):.2f})"
                if name in timing.seconds
                else ""
                for name in engines
            ),
            f"{max(timing.interquartile_range.values()):.0%}",
        ]
        for timing in figures.timings
    ]
    yield Sheet(
        ["", *engines, "interquartile range"],
        rows,
        f"{figures.bundle}, {figures.precision}: milliseconds per step or token",
        f"in brackets: how many times faster the first is; memory reads and writes {figures.bytes_per_second / 1e9:.0f}"
        " GB/s",
    )
    crossed = [[provider, *(f"{count:.0f}" for count in found.values())]
               for provider, found in figures.bytes_per_step.items()]  # fmt: skip
    yield Sheet(["provider", "bytes to the device in a step", "bytes to the host"], crossed)


def show(figures: BundleFigures) -> None:
    """Print all figures, and what was left out and why."""
    console.show(*(sheet for sheet in sheets(figures) if sheet.rows))
    for line in (*(f"{name}: {reason}" for name, reason in figures.unavailable.items()), *figures.skipped):
        console.stdout.print(f"left out: {line}")


def main(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles of one checkpoint.")],
    reference: Annotated[Path, typer.Option(help="The checkpoint that they were exported from.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compare with torch.compile too.")] = True,
    seconds: Annotated[int, typer.Option(min=1, help="Start no new part after this many seconds.")] = 400,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Verify and measure bundles, one of each precision, on this machine's GPU. Exit 1 if a gate is missed."""
    from chameleon_deploy.runtime.device.cuda import import_cudart

    deadline = time.monotonic() + seconds
    console.check_output(json_file)
    import_cudart()  # raises, in one line, what is missing
    opened = [open_bundle(path) for path in bundles]
    import torch

    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.inference import RowLogits
    from chameleon_deploy.runtime import Runtime
    from chameleon_deploy.runtime.device import engines
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
            figures.append(check_bundle(bundle, rows, openers, torch_device, compiled, deadline, report))
            if json_file:  # after each bundle, so that figures survive a later failure
                console.write_json(record(asdict(device), figures), json_file)
    for found in figures:
        show(found)
    missed = [line for found in figures for line in found.missed]
    if missed:
        raise CheckFailedError(f"{len(missed)} missed: {'; '.join(missed)}")


def record(device: dict[str, str], figures: list[BundleFigures]) -> dict[str, Any]:
    """Return the content of the JSON file: the figures, with `passed` for each check."""
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
