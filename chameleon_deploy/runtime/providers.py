"""Open a bundle on a provider, or say why that is impossible: there is no silent fallback.

cpu       ONNX Runtime on the CPU
cuda      ONNX Runtime's CUDA provider
tensorrt  TensorRT engines that `engines` built on this machine
auto      the first of tensorrt, cuda, cpu that is available
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chameleon_deploy.contract.bundle import Bundle, Role
from chameleon_deploy.errors import DependencyError, ProviderError
from chameleon_deploy.runtime.backend import Backend, CpuBackend, DeviceBackend
from chameleon_deploy.runtime.decode.session import import_onnxruntime, open_session
from chameleon_deploy.runtime.device.cuda import CudaDevice, import_cudart
from chameleon_deploy.runtime.device.graph import DeviceGraph, SessionGraph
from chameleon_deploy.runtime.device.tensorrt import open_engines

PROVIDERS = ("cpu", "cuda", "tensorrt", "auto")


def check_provider(provider: str) -> None:
    """Raise ProviderError for a name that is not one of PROVIDERS."""
    if not isinstance(provider, str) or provider not in PROVIDERS:
        raise ProviderError(f"provider {provider!r:.40} does not exist: choose one of {', '.join(PROVIDERS)}")


def open_backend(bundle: Bundle, provider: str, threads: int | None = None, share_weights: bool = False) -> Backend:
    """Open a bundle on a provider. `Backend.provider` is the one that `auto` selected; `load` explains the other
    arguments.

    Raises ProviderError or DependencyError, which say what is missing, or GraphError.
    """
    check_provider(provider)
    if share_weights and provider in ("cuda", "tensorrt"):
        raise ProviderError(f"share_weights needs provider 'cpu': provider {provider!r} keeps weights on the device")
    if provider == "auto":
        for candidate in ("tensorrt", "cuda"):
            try:
                return open_backend(bundle, candidate)
            except (ProviderError, DependencyError):
                continue
    if provider == "cuda":
        return open_cuda(bundle)
    return open_tensorrt(bundle) if provider == "tensorrt" else open_cpu(bundle, threads, share_weights)


def open_cpu(
    bundle: Bundle, threads: int | None = None, share_weights: bool = False, graph: str | None = None
) -> CpuBackend:
    """Open a bundle with ONNX Runtime on the CPU.

    threads, share_weights  see `load`
    graph                   one of the manifest's decoder graphs by name; None takes the CPU's own

    Raises GraphError, DependencyError, or OutputError if the local cache cannot be written.
    """
    graphs = bundle.manifest.graphs
    names: dict[Role, str] = {"decoder": graph or bundle.graph("decoder", "cpu")}
    if graphs[names["decoder"]].cache == "shared":
        names["hidden_scorer"] = bundle.graph("hidden_scorer", "cpu")
    if bundle.manifest.adaptation.regime == "chameleon":
        names["hypernetwork"] = bundle.graph("hypernetwork", "cpu")
    sessions: dict[Role, Any] = {
        role: open_session(bundle, graphs[name], threads, share_weights=share_weights) for role, name in names.items()
    }
    return CpuBackend(bundle, names["decoder"], sessions)


def open_cuda(bundle: Bundle) -> DeviceBackend:
    """Open a bundle with ONNX Runtime on the first visible GPU.

    Raises ProviderError, DependencyError or GraphError.
    """
    device = CudaDevice(import_cudart())
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        raise ProviderError(
            "this onnxruntime was built without CUDA: pip uninstall onnxruntime, "
            "then pip install 'chameleon-deploy[gpu]'"
        )
    options = {"user_compute_stream": str(device.stream), "use_tf32": "0"}  # the stream that our copies are on
    graphs = open_sessions(bundle, graph_names(bundle, "cuda"), ("CUDAExecutionProvider", options), "cuda")
    return DeviceBackend("cuda", device, bundle, graphs)


def open_tensorrt(bundle: Bundle) -> DeviceBackend:
    """Open a bundle with the TensorRT engines that have been built for the first visible GPU.

    Raises ProviderError, DependencyError or GraphError.
    """
    device = CudaDevice(import_cudart())
    graphs = open_engines(bundle, device, graph_names(bundle, "tensorrt"))
    return DeviceBackend("tensorrt", device, bundle, graphs, bundle.manifest.limits)


def graph_names(bundle: Bundle, provider: str) -> dict[Role, str]:
    """Return the names of the graphs that a device needs, by role."""
    roles: tuple[Role, ...] = ("decoder", "chooser", "logits_scorer")
    if bundle.manifest.adaptation.regime == "chameleon":
        roles = (*roles, "hypernetwork")
    return {role: bundle.graph(role, provider) for role in roles}


def open_sessions(
    bundle: Bundle,
    names: Mapping[Role, str],
    execution_provider: tuple[str, dict[str, str]],
    device_type: str,
    threads: int | None = None,
) -> dict[Role, DeviceGraph]:
    """Open graphs by role with ONNX Runtime.

    device_type  ONNX Runtime's name of the memory that the addresses are in
    """
    graphs: dict[Role, DeviceGraph] = {}
    for role, name in names.items():
        spec = bundle.manifest.graphs[name]
        graphs[role] = SessionGraph(open_session(bundle, spec, threads, execution_provider), spec, device_type)
    return graphs
