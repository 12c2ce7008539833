"""What a generation on a device costs, part by part, and what crosses to and from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from chameleon_deploy.bench.peers import Rows
from chameleon_deploy.bench.peers.bundle import Bundle
from chameleon_deploy.bench.timing import median_seconds
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.adaptation import assign, embed
from chameleon_deploy.runtime.backend import DeviceBackend

ROUNDS = 5


def cost_split(runtime: Runtime, rows: Rows, num_tokens: int) -> dict[str, float]:
    """Seconds of the parts of a greedy generation, medians, each waited for.

    Choosing and copying are parts of decoding; they are timed again alone.
    """
    backend, spec = device_backend(runtime), runtime.manifest.adaptation
    device, table, centroids = backend.device, runtime.bundle.token_embedding(), runtime.bundle.centroids()
    eos, steps = runtime.manifest.model.eos_token_id, num_tokens - 1
    adaptation = runtime.adapt(rows, on_device=True)
    vectors = adaptation.embeddings[: len(adaptation.factors.sets)]
    logits, _ = runtime.decoder.prefill(rows, adaptation.factors, len(rows[0]))
    numbers = device.zeros((2, 32), "int64")

    def hypernetwork() -> None:
        backend.generate_factors(vectors)
        device.synchronize()

    def copies() -> None:
        for _ in range(steps):
            device.write(numbers, np.zeros((2, 32), np.int64))
            device.read(numbers.view((1, 32)))

    parts: dict[str, Callable[[], object]] = {
        "embed and cluster, on the host": lambda: assign(embed(rows, table, spec, eos), centroids),
        f"of decoding: choosing, {steps} steps": lambda: [logits.greedy() for _ in range(steps)],
        f"of decoding: copies, {steps} steps": copies,
    }
    if spec.regime == "chameleon":
        parts["hypernetwork"] = hypernetwork
    seconds = {name: median_seconds(part, ROUNDS) for name, part in parts.items()}
    laps: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 1):
        last = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal last
            now = time.perf_counter()
            laps.setdefault(part, []).append(now - last)
            last = now

        Bundle(runtime).generate(rows, num_tokens, lap)
    return seconds | {f"decoder, {part}": float(np.median(taken[1:])) for part, taken in laps.items()}


def bytes_per_step(runtime: Runtime, rows: Rows, steps: int) -> dict[str, float]:
    """Bytes that crossed in a greedy step, counted by the device; the step that binds the others is left out."""
    device, factors = device_backend(runtime).device, runtime.adapt(rows, on_device=True).factors
    logits, cache = runtime.decoder.prefill(rows, factors, len(rows[0]) + steps + 1)
    logits = runtime.decoder.step(logits.greedy(), factors, cache)
    uploaded, downloaded = device.uploaded, device.downloaded
    for _ in range(steps):
        logits = runtime.decoder.step(logits.greedy(), factors, cache)
    return {"to device": (device.uploaded - uploaded) / steps, "to host": (device.downloaded - downloaded) / steps}


def measure_bandwidth(runtime: Runtime, size: int = 2**30) -> float:
    """Bytes per second that the device's memory can be read and written at, in one large copy: the best of several."""
    device = device_backend(runtime).device
    source, target = device.zeros((size // 4,), "float32"), device.zeros((size // 4,), "float32")

    def work() -> None:
        for _ in range(8):
            device.copy(target.address, size, source.address, size, size, 1)
        device.synchronize()

    fastest = math.inf
    for _ in range(ROUNDS):
        fastest = min(fastest, median_seconds(work, 1))
    return 8 * 2 * size / fastest


def device_backend(runtime: Runtime) -> DeviceBackend:
    """Raises TypeError for a runtime on the CPU."""
    backend = runtime.backend
    if not isinstance(backend, DeviceBackend):
        raise TypeError(f"provider {runtime.provider} does not run on a device")
    return backend
