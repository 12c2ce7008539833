"""Runtimes on a given graph or device. GPUs are driven on this machine's memory: see fake_cuda.py."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import Bundle, LimitsSpec, Role
from chameleon_deploy.runtime import providers
from chameleon_deploy.runtime.backend import DeviceBackend
from chameleon_deploy.runtime.decode.session import CPU
from chameleon_deploy.runtime.device.cuda import CudaDevice
from chameleon_deploy.runtime.device.graph import DeviceGraph
from chameleon_deploy.runtime.device.profiles import profiles
from chameleon_deploy.runtime.device.tensorrt import EngineGraph
from tests.fake_cuda import FAKE_TENSORRT, FakeCudart, FakeEngine

needs_no_gpu = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")


def on_cpu(bundle: Bundle, graph: str | None = None) -> Runtime:
    """One of the bundle's decoder graphs for the CPU, on one thread; None takes the CPU's own."""
    return Runtime(bundle, providers.open_cpu(bundle, threads=1, graph=graph))


def with_sessions(bundle: Bundle, cudart: FakeCudart) -> Runtime:
    """As provider `cuda`: ONNX Runtime with IO binding."""
    graphs = providers.open_sessions(bundle, providers.graph_names(bundle, "cuda"), CPU, "cpu", threads=1)
    return Runtime(bundle, DeviceBackend("cuda", CudaDevice(cudart), bundle, graphs, None))


def with_engines(bundle: Bundle, cudart: FakeCudart, limits: LimitsSpec | None = None) -> Runtime:
    """As provider `tensorrt`: engines with the profiles that they are built with."""
    device, manifest = CudaDevice(cudart), bundle.manifest
    if limits:
        manifest = msgspec.structs.replace(manifest, limits=limits)
    graphs: dict[Role, DeviceGraph] = {}
    for role, name in providers.graph_names(bundle, "tensorrt").items():
        spec = manifest.graphs[name]
        shapes = [{t.name: profile.shapes(t) for t in spec.inputs} for profile in profiles(manifest, spec)]
        engine = FakeEngine(bundle.path / spec.file, shapes, cudart)
        graphs[role] = EngineGraph(FAKE_TENSORRT, engine, spec, device)
    return Runtime(bundle, DeviceBackend("tensorrt", device, bundle, graphs, manifest.limits))
