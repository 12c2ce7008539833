"""Bytes copied to and from a device in a step, and the bandwidth of its memory."""

from __future__ import annotations

import math

from chameleon_deploy.bench.peers import Rows
from chameleon_deploy.bench.timing import median_seconds
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.backend import DeviceBackend

ROUNDS = 5


def bytes_per_step(runtime: Runtime, rows: Rows, steps: int) -> dict[str, float]:
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
    """Return the device backend. Raises TypeError for a runtime on the CPU."""
    backend = runtime.backend
    if not isinstance(backend, DeviceBackend):
        raise TypeError(f"provider {runtime.provider} does not run on a device")
    return backend
