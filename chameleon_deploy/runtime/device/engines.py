"""TensorRT engines on this machine: the library, the device, and where the engines of a bundle are stored.

`export` builds them and the runtime runs them. Importing this module imports neither TensorRT nor CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from chameleon_deploy.contract.bundle import Bundle, Manifest
from chameleon_deploy.errors import DependencyError, ProviderError
from chameleon_deploy.runtime.device.profiles import profiles
from chameleon_deploy.store import local_cache

P = ParamSpec("P")
R = TypeVar("R")

KIND = "engines"  # the kind of these entries in the local cache
LIBRARIES = ("tensorrt", "tensorrt_rtx")  # the first installed one is used; the second is TensorRT for RTX
AHEAD_OF_TIME = "any"  # the device's name in the key of an engine that was built without a device


@dataclass(frozen=True)
class Device:
    """The device that an engine is built for.

    compute_capability  "8.9", or several with commas for an engine that was built ahead of time
    driver              the newest CUDA version that the driver supports, "13.0"; "none" without a driver
    """

    name: str
    compute_capability: str
    driver: str


def import_tensorrt() -> Any:
    """Return the module `tensorrt`, or `tensorrt_rtx` if only that is installed; the interfaces used here are the same.

    Raises DependencyError.
    """
    for name in LIBRARIES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise DependencyError(f"{name} is installed without {error.name}: pip install it again") from error
        except (ImportError, OSError, RuntimeError) as error:  # the library does not load on this machine
            raise DependencyError(f"{name} is installed and does not load: {error}") from error
    raise DependencyError(
        "TensorRT is not installed: pip install 'chameleon-deploy[tensorrt]' (NVIDIA data center and RTX GPUs), or "
        "'chameleon-deploy[tensorrt-rtx]' (RTX GPUs; also builds without a GPU)"
    )


def is_rtx(tensorrt: Any) -> bool:
    """Return whether a module of `import_tensorrt` is TensorRT for RTX, which builds without a GPU for a list of
    devices.
    """
    return str(tensorrt.__name__) == "tensorrt_rtx"


def require_driver() -> None:
    """Raise ProviderError without an NVIDIA driver. TensorRT's Runtime would end the process instead."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ProviderError(f"no NVIDIA driver: {error}: install one, or use provider 'cpu'") from error


def released_on_error(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that it releases its TensorRT objects as soon as it raises.

    The frames of the traceback are cleared. Otherwise the cyclic garbage collector destroys the objects later, possibly
    inside a TensorRT log callback that already holds the lock which the destructor needs. That deadlocks or crashes.
    """

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise

    return wrapped


def create_runtime(tensorrt: Any, logger: Any) -> Any:
    """Return a tensorrt.Runtime. Raises ProviderError without a driver."""
    require_driver()
    return tensorrt.Runtime(logger)


def current_device() -> Device:
    """Return the first GPU that this process sees. Raises ProviderError or DependencyError."""
    require_driver()
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DependencyError("cuda-bindings is not installed: pip install cuda-bindings") from error

    def call(function: Any, *arguments: Any) -> Any:
        status, *results = function(*arguments)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise ProviderError(f"no NVIDIA GPU can be used: {function.__name__} says {status.name}")
        return results[0] if results else None

    call(driver.cuInit, 0)
    device = call(driver.cuDeviceGet, 0)
    attributes = driver.CUdevice_attribute
    major, minor = (
        call(driver.cuDeviceGetAttribute, attribute, device)
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = bytes(call(driver.cuDeviceGetName, 128, device)).split(b"\0")[0].decode()
    version = call(driver.cuDriverGetVersion)
    return Device(name, f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}")


def target_device(tensorrt: Any) -> Device:
    """Return the device that `engines` builds for.

    It is this machine's GPU, or without one every GPU of TensorRT for RTX. Raises ProviderError if neither is possible,
    or DependencyError.
    """
    targets = compute_capabilities(tensorrt)
    try:
        device = current_device()
    except ProviderError:
        if not is_rtx(tensorrt):
            raise
        return Device(AHEAD_OF_TIME, ",".join(targets), "none")
    if is_rtx(tensorrt) and device.compute_capability not in targets:
        raise ProviderError(
            f"TensorRT for RTX builds for compute capabilities {', '.join(targets)}, not for "
            f"{device.compute_capability} ({device.name}): pip install 'chameleon-deploy[tensorrt]'"
        )
    return device


def compute_capabilities(tensorrt: Any) -> dict[str, Any]:
    """Return the devices that TensorRT for RTX builds for ahead of time, "8.9": ComputeCapability.SM89; none for
    TensorRT.

    Turing (7.5) is left out, since the library has no float32 matrix products for it.
    """
    if not is_rtx(tensorrt):
        return {}
    members = tensorrt.ComputeCapability.__members__.items()
    found = {int(name.removeprefix("SM")): member for name, member in members if name.startswith("SM")}
    return {f"{sm // 10}.{sm % 10}": found[sm] for sm in sorted(found) if sm >= 80}


def engine_graphs(manifest: Manifest) -> tuple[str, ...]:
    """Return the names of the graphs that have an engine each."""
    return tuple(name for name, graph in manifest.graphs.items() if "tensorrt" in graph.providers)


def engine_file(graph: str) -> str:
    """Return the path of a graph's engine in a directory of `find_engines`."""
    return f"{graph}.engine"


def engine_key(bundle: Bundle, tensorrt: Any, device: Device) -> dict[str, str]:
    """Return the key of a bundle's engines. An engine with any other key is never deserialised."""
    manifest = bundle.manifest
    key = {
        "bundle": bundle.digest,
        "builder": f"{tensorrt.__name__} {tensorrt.__version__}",
        "device": device.name,
        "compute_capability": device.compute_capability,
        "driver": device.driver,
        "precision": manifest.precision,
    }
    for name in engine_graphs(manifest):
        key[f"profiles.{name}"] = "; ".join(map(str, profiles(manifest, manifest.graphs[name])))
    return key


def find_engines(bundle: Bundle, tensorrt: Any, device: Device) -> Path:
    """Return the directory of a bundle's engines after checking its key and digests.

    Raises ProviderError if there are none for exactly this bundle, library version and device.
    """
    found = local_cache.find(KIND, engine_key(bundle, tensorrt, device))
    if found is None:
        raise ProviderError(
            f"no TensorRT engines for {bundle.path} on {device.name} with {tensorrt.__name__} {tensorrt.__version__}: "
            f"build them with `python -m chameleon_deploy.engines {bundle.path}`"
        )
    return found


def make_logger(tensorrt: Any) -> Any:
    """Return a tensorrt.ILogger that collects errors in its list `errors` and drops other messages."""

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()
