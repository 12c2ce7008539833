"""A provider that cannot be had says why; none is ever replaced by another in silence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

import chameleon_deploy
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import DependencyError, ProviderError
from chameleon_deploy.runtime import providers
from chameleon_deploy.runtime.decode.session import open_session
from chameleon_deploy.runtime.device import cuda, engines
from chameleon_deploy.store.local_cache import find_or_build
from tests.commands import call
from tests.devices import needs_no_gpu
from tests.fake_cuda import FakeCudart


@needs_no_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_without_a_driver(bundle: Path, provider: str) -> None:
    with pytest.raises(ProviderError, match="no NVIDIA driver: libcuda"):
        chameleon_deploy.load(bundle, provider=provider)


@needs_no_gpu
def test_auto_says_what_it_took(bundle: Path) -> None:
    assert chameleon_deploy.load(bundle, provider="auto").provider == "cpu"


def test_a_provider_that_does_not_exist(bundle: Path) -> None:
    with pytest.raises(ProviderError, match="choose one of cpu, cuda, tensorrt, auto"):
        chameleon_deploy.load(bundle, provider="tpu")


def test_onnxruntime_without_cuda(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU wheel, on a machine that has a GPU."""
    monkeypatch.setattr(providers, "import_cudart", FakeCudart)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="built without CUDA: pip uninstall onnxruntime"):
        chameleon_deploy.load(bundle, provider="cuda")
    assert chameleon_deploy.load(bundle, provider="auto").provider == "cpu"


@needs_no_gpu
def test_the_silent_fallback_of_onnxruntime_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for CUDA where it cannot be had, ONNX Runtime gives a session on the CPU; it is not used."""
    opened = open_bundle(bundle)
    spec = opened.manifest.graphs["decoder"]
    session = onnxruntime.InferenceSession(bundle / spec.file, providers=["CUDAExecutionProvider"])
    assert session.get_providers() == ["CPUExecutionProvider"]  # what makes the check necessary
    with pytest.raises(ProviderError, match="would have run on the CPU"):
        open_session(opened, spec, None, ("CUDAExecutionProvider", {}))
    monkeypatch.setattr(providers, "import_cudart", FakeCudart)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ProviderError, match="would have run on the CPU"):
        chameleon_deploy.load(bundle, provider="cuda")


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "require_driver", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DependencyError, match=r"pip install 'chameleon-deploy\[gpu\]'"):
        cuda.import_cudart()


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "require_driver", lambda: None)
    runtime = SimpleNamespace(cudaGetDeviceCount=lambda: (0, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))
    with pytest.raises(ProviderError, match="gives no GPU"):
        cuda.import_cudart()


def fake_tensorrt(readable: bool) -> Any:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: object() if readable else None)
    return SimpleNamespace(__name__="tensorrt", __version__="11.1", Runtime=lambda logger: runtime)


def test_engines_that_are_missing_or_cannot_be_read(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path))
    tensorrt = fake_tensorrt(False)
    device = engines.Device("a GPU", "9.0", "13.0")
    monkeypatch.setattr(providers, "import_cudart", FakeCudart)
    monkeypatch.setattr(engines, "import_tensorrt", lambda: tensorrt)
    monkeypatch.setattr(engines, "current_device", lambda: device)
    monkeypatch.setattr(engines, "require_driver", lambda: None)
    monkeypatch.setattr(engines, "make_logger", lambda _: SimpleNamespace(errors=["a bad magic number"]))
    with pytest.raises(ProviderError, match=r"chameleon_deploy\.engines"):
        chameleon_deploy.load(bundle, provider="tensorrt")
    opened = open_bundle(bundle)

    def build(directory: Path) -> None:
        for name in engines.engine_graphs(opened.manifest):
            (directory / engines.engine_file(name)).write_bytes(b"engine")

    path = find_or_build(engines.KIND, engines.engine_key(opened, tensorrt, device), build)
    with pytest.raises(ProviderError, match="cannot read it: a bad magic number: delete it"):
        chameleon_deploy.load(bundle, provider="tensorrt")
    monkeypatch.setattr(tensorrt, "Runtime", lambda logger: pytest.fail("an engine was read before it was checked"))
    (path / "decoder.engine").write_bytes(b"tampered with")
    with pytest.raises(ProviderError, match="no TensorRT engines"):
        chameleon_deploy.load(bundle, provider="tensorrt")


@needs_no_gpu
@pytest.mark.parametrize("command", ["generate", "score"])
def test_the_commands_take_a_provider(bundle: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "t.txt").write_text("The river runs.\n")
    what: list[Any] = ["--prompt", "x"] if command == "generate" else ["--text", str(tmp_path / "t.txt")]
    arguments = [f"chameleon_deploy.{command}", bundle, *what, "--json", "--provider"]
    result = call(*arguments, "tensorrt")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no NVIDIA driver")
    assert result.stderr.count("\n") == 1
    result = call(*arguments, "auto")
    assert result.returncode == 0
    assert result.stderr == "provider: cpu\n"
    json.loads(result.stdout)
