"""Finding TensorRT, the device and a bundle's engines; the shapes that engines are built for."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy.contract.bundle import Bundle, LimitsSpec, Manifest, open_bundle
from chameleon_deploy.errors import DependencyError, ProfileError, ProviderError
from chameleon_deploy.runtime.device import engines
from chameleon_deploy.runtime.device.engines import Device
from chameleon_deploy.runtime.device.profiles import DECODE, PREFILL, Profile, Range, check_profile, profiles
from chameleon_deploy.store import local_cache
from tests.shared_data import good_bundle

MANIFEST: Manifest = open_bundle(good_bundle("chameleon_masked")).manifest
DECODER = MANIFEST.graphs["decoder"]
TENSORRT = SimpleNamespace(__name__="tensorrt", __version__="10.13.0")
GPU = Device("NVIDIA L4", "8.9", "13.0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))


def test_importing_loads_no_tensorrt_and_no_cuda() -> None:
    code = (
        "import sys, chameleon_deploy.runtime.device.engines\n"
        "print(sorted({'tensorrt', 'tensorrt_rtx', 'cuda'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in engines.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)  # what Python keeps of a module that is not there
    with pytest.raises(DependencyError, match=r"chameleon-deploy\[tensorrt-rtx\]"):
        engines.import_tensorrt()


def test_a_tensorrt_that_does_not_load_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=r"does not load: libnvinfer\.so\.10"):
        engines.import_tensorrt()


def test_without_a_driver_no_runtime_is_made() -> None:
    """It would end the process: that the check stands in front of it is what this test is for."""
    if _has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    tensorrt = engines.import_tensorrt()
    with pytest.raises(ProviderError, match="no NVIDIA driver"):
        engines.create_runtime(tensorrt, engines.make_logger(tensorrt))
    with pytest.raises(ProviderError, match="no NVIDIA driver"):
        engines.current_device()


def test_ahead_of_time_the_device_is_every_target_of_rtx() -> None:
    if _has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    device = engines.target_device(engines.import_tensorrt())
    assert device == Device("any", "8.0,8.6,8.9,12.0,12.1", "none")
    with pytest.raises(ProviderError, match="no NVIDIA driver"):
        engines.target_device(TENSORRT)


def _has_driver() -> bool:
    try:
        engines.require_driver()
    except ProviderError:
        return False
    return True


class _Driver:
    """What cuda.bindings.driver answers on a machine with one GPU, or, with status 100, on one without."""

    class CUdevice_attribute:  # noqa: N801  (cuda-bindings' name)
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = "major", "minor"

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))

    def __init__(self, major: int = 8, minor: int = 9, fault: bool = False) -> None:
        self.capability = {"major": major, "minor": minor}
        self.status = SimpleNamespace(name="CUDA_ERROR_NO_DEVICE") if fault else self.CUresult.CUDA_SUCCESS

    def cuInit(self, _: int) -> Any:
        return (self.status,)

    def cuDeviceGet(self, index: int) -> Any:
        return self.status, index

    def cuDeviceGetAttribute(self, attribute: str, _: int) -> Any:
        return self.status, self.capability[attribute]

    def cuDeviceGetName(self, length: int, _: int) -> Any:
        return self.status, b"NVIDIA L4".ljust(length, b"\0")

    def cuDriverGetVersion(self) -> Any:
        return self.status, 13000


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Driver], None]:
    def have(driver: _Driver) -> None:
        monkeypatch.setattr(engines, "require_driver", lambda: None)
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)

    return have


def test_the_device_is_what_the_driver_says(machine: Callable[[_Driver], None]) -> None:
    machine(_Driver())
    assert engines.current_device() == GPU
    assert engines.target_device(engines.import_tensorrt()) == GPU
    machine(_Driver(fault=True))
    with pytest.raises(ProviderError, match="CUDA_ERROR_NO_DEVICE"):
        engines.current_device()


def test_a_gpu_that_rtx_does_not_build_for_is_named(machine: Callable[[_Driver], None]) -> None:
    machine(_Driver(9, 0))
    with pytest.raises(ProviderError, match=r"not for 9\.0"):
        engines.target_device(engines.import_tensorrt())


def _changed(bundle: Bundle) -> dict[str, tuple[Bundle, Any, Device]]:
    """Everything that an engine depends on, changed alone."""

    def replace(struct: Any, **fields: Any) -> Any:
        return msgspec.structs.replace(struct, **fields)

    def with_manifest(**fields: Any) -> Bundle:
        return dataclasses.replace(bundle, manifest=replace(bundle.manifest, **fields))

    newer = SimpleNamespace(__name__="tensorrt", __version__="10.14.0")
    other = SimpleNamespace(__name__="tensorrt_rtx", __version__="10.13.0")
    limits = replace(bundle.manifest.limits, batch=bundle.manifest.limits.batch + 1)
    return {
        "bundle": (dataclasses.replace(bundle, digest="0" * 64), TENSORRT, GPU),
        "precision": (with_manifest(precision="fp16"), TENSORRT, GPU),
        "limits": (with_manifest(limits=limits), TENSORRT, GPU),
        "version": (bundle, newer, GPU),
        "library": (bundle, other, GPU),
        "gpu": (bundle, TENSORRT, Device("NVIDIA L40", "8.9", "13.0")),
        "compute capability": (bundle, TENSORRT, Device("NVIDIA L4", "9.0", "13.0")),
        "driver": (bundle, TENSORRT, Device("NVIDIA L4", "8.9", "13.1")),
    }


BUNDLE = open_bundle(good_bundle("chameleon_masked"))


@pytest.mark.parametrize("change", _changed(BUNDLE))
def test_engines_of_anything_else_are_not_found(change: str) -> None:
    key = engines.engine_key(BUNDLE, TENSORRT, GPU)
    path = local_cache.find_or_build("engines", key, lambda out: (out / "decoder.engine").touch())
    assert engines.find_engines(BUNDLE, TENSORRT, GPU) == path
    with pytest.raises(ProviderError, match=r"chameleon_deploy\.engines"):
        engines.find_engines(*_changed(BUNDLE)[change])


def test_tampered_engines_are_not_found() -> None:
    key = engines.engine_key(BUNDLE, TENSORRT, GPU)
    path = local_cache.find_or_build("engines", key, lambda out: (out / "decoder.engine").touch())
    (path / "decoder.engine").write_bytes(b"Engine")
    with pytest.raises(ProviderError, match=r"chameleon_deploy\.engines"):
        engines.find_engines(BUNDLE, TENSORRT, GPU)


POSITIONS = MANIFEST.model.max_positions


@settings(deadline=None)
@given(
    batch=st.integers(1, 4096),
    sequence=st.integers(1, POSITIONS),
    past=st.integers(1, POSITIONS - 1),
    factor_sets=st.integers(1, 4096),
)
def test_any_limits_give_good_profiles(batch: int, sequence: int, past: int, factor_sets: int) -> None:
    limits = LimitsSpec(batch, sequence, past, factor_sets)
    manifest = msgspec.structs.replace(MANIFEST, limits=limits)
    for name in engines.engine_graphs(manifest):
        graph = manifest.graphs[name]
        for profile in profiles(manifest, graph):
            check_profile(profile, POSITIONS)
            for tensor in graph.inputs:
                for least, usual, most in zip(*profile.shapes(tensor), strict=True):
                    assert least <= usual <= most
    prefill, decode = profiles(manifest, DECODER)
    tensors = {tensor.name: tensor for tensor in DECODER.inputs}
    assert prefill.shapes(tensors["input_ids"])[2] == (batch, sequence)
    assert decode.shapes(tensors["past_key_values.0.key"])[2][2] == past
    assert decode.shapes(tensors["attention_mask"])[2] == (batch, past + 1)
    assert decode.shapes(tensors["lm_head.lora_A"])[2][0] == factor_sets


def test_prefill_and_decode_are_the_profiles_of_a_decoder() -> None:
    of_decoder = profiles(MANIFEST, DECODER)
    assert (of_decoder[PREFILL].name, of_decoder[DECODE].name) == ("prefill", "decode")
    assert of_decoder[PREFILL].ranges["past"] == Range(0, 0, 0)
    assert of_decoder[DECODE].ranges["sequence"] == Range(1, 1, 1)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"batch": Range(2, 1, 4)}, "batch 2..1..4 is not"),
        ({"batch": Range(1, 5, 4)}, "batch 1..5..4 is not"),
        ({"past": Range(-1, 0, 4)}, "past -1..0..4 is not"),
        ({"sequence": Range(1, 1, POSITIONS + 1)}, "positions"),
        ({"past": Range(0, 0, POSITIONS), "sequence": Range(1, 1, 1)}, "positions"),
    ],
)
def test_wrong_profiles_are_refused(ranges: dict[str, Range], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        check_profile(Profile("test", ranges), POSITIONS)


def test_a_symbol_without_a_range_is_refused() -> None:
    with pytest.raises(ProfileError, match="no range for 'batch' of input_ids"):
        Profile("test", {}).shapes(DECODER.inputs[0])
