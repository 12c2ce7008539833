"""gpu_check without a GPU: what it refuses, and its whole path on this machine's memory instead of a GPU's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chameleon_deploy.bench import gpu_check, workloads
from chameleon_deploy.bench.peers.pytorch_gpu import PyTorchGPU
from chameleon_deploy.contract.bundle import Mode, open_bundle
from chameleon_deploy.errors import ProviderError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.random import random_checkpoint
from chameleon_deploy.verify import checkpoint_checks
from chameleon_deploy.verify import run as verify
from chameleon_deploy.verify.gates import Check
from tests.devices import needs_no_gpu, with_engines, with_sessions
from tests.fake_cuda import FakeCudart
from tests.logits import row_logits


@needs_no_gpu
def test_without_a_gpu_it_is_one_line(bundle: Path, mini_path: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "chameleon_deploy.bench.gpu_check", bundle, "--reference", mini_path, "--json",
         tmp_path / "figures.json"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: no NVIDIA driver")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "figures.json").exists()


OPENERS: dict[str, Any] = {
    "tensorrt": lambda bundle: with_engines(bundle, FakeCudart()),
    "cuda": lambda bundle: with_sessions(bundle, FakeCudart()),
}


def check(bundle: Path, checkpoint: Checkpoint, deadline: float = math.inf, openers: Any = OPENERS) -> Any:
    opened, reference = open_bundle(bundle), RowLogits(checkpoint)
    return gpu_check.check_bundle(opened, reference, openers, "cpu", False, deadline, lambda *_: None)


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that need no corpus to be read: what the real ones are is tested elsewhere."""
    rows = [[(7 * i + j * j) % 512 for j in range(40)] for i in range(32)]
    monkeypatch.setattr(verify, "verification_rows", lambda *_: rows)
    monkeypatch.setattr(workloads, "text_rows", lambda _, batch, width: [ids[:width] for ids in rows[:batch]])


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BATCH_SIZES", (1, 3))
    monkeypatch.setattr(gpu_check, "WIDTH", 12)
    monkeypatch.setattr(gpu_check, "NUM_TOKENS", 5)
    monkeypatch.setattr(gpu_check, "ROUNDS", 1)
    monkeypatch.setattr(gpu_check, "COPIES", 1)
    bandwidth = gpu_check.measure_bandwidth
    monkeypatch.setattr(gpu_check, "measure_bandwidth", lambda runtime: bandwidth(runtime, 2**16))


@pytest.fixture(scope="module", params=["the head", "all layers", "LoRA of all layers"])
def of_each_kind(
    request: pytest.FixtureRequest, bundle: Path, mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Checkpoint]:
    """A bundle and its checkpoint, by what its factors update."""
    if request.param == "the head":
        return bundle, mini
    directory = tmp_path_factory.mktemp("gpu_check")
    if request.param == "all layers":
        random_checkpoint(directory / "checkpoint", "mini", targets=["all"], architecture="shared")
    else:
        random_checkpoint(directory / "checkpoint", "mini", "lora", targets=["all"])
    checkpoint = load_checkpoint(directory / "checkpoint")
    export_bundle(checkpoint, directory / "bundle")
    return directory / "bundle", checkpoint


@pytest.mark.usefixtures("_quick")
def test_it_verifies_and_measures_every_backend(
    of_each_kind: tuple[Path, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []

    def checks(runtime: Any, *_: Any) -> list[Check]:  # the real one on these runtimes: test_device.py
        verified.append(runtime.provider)
        return [Check("a gate", 0.5, 1.0)]

    monkeypatch.setattr(checkpoint_checks, "verify_checkpoint", checks)
    figures = check(*of_each_kind)
    assert verified == ["tensorrt", "cuda"]
    assert figures.missed == figures.skipped == []
    kinds = [timing.part.name.split()[0] for timing in figures.timings]
    assert kinds == ["prefill", "adapt", "prefill", "decode,"] * 2 + ["scoring"]
    engines = {"tensorrt", "cuda", "no adaptation", "PyTorch eager fp32"}
    for timing in figures.timings:
        assert set(timing.seconds) == set(timing.deviations) == engines
    assert figures.bytes_per_second > 0
    assert figures.bytes_per_step == {name: {"to device": 512, "to host": 3 * 8} for name in OPENERS}
    content = json.loads(json.dumps(gpu_check.record({"name": "a GPU"}, [figures]), allow_nan=False))
    assert content["bundles"][0]["checks"]["cuda"][0]["passed"] is True
    assert content["bundles"][0]["timings"][0]["ratios"]["PyTorch eager fp32"] > 0
    assert len(list(gpu_check.sheets(figures))) == 2


@pytest.mark.usefixtures("_quick")
def test_a_missed_gate_and_a_wrong_result_are_told(
    of_each_kind: tuple[Path, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, own = of_each_kind
    other = replace(own, config=msgspec.structs.replace(own.config, alpha=-3.0))  # of another export
    monkeypatch.setattr(checkpoint_checks, "verify_checkpoint", lambda *_: [Check("a gate", 2.0, 1.0)])
    figures = check(bundle, other, openers={"cuda": OPENERS["cuda"]})
    assert f"{bundle}, cuda: a gate" in figures.missed
    assert any("the results of cuda are wrong" in line for line in figures.missed)
    assert not any("PyTorch eager" in line for line in figures.missed)


def test_pytorch_on_a_device_is_the_reference(of_each_kind: tuple[Path, Checkpoint]) -> None:
    """The yardstick itself, and compiled: the same code as on a GPU, with PyTorch's compiler for processors.

    Compiled where every layer has generated factors, the head among them; compiling takes 10 s each.
    """
    _, own = of_each_kind
    mode: Mode = "static" if own.config.regime == "lora" else "request"
    of_every_layer = own.config.regime == "chameleon" and len(own.config.targets) > 1
    eager = PyTorchGPU(own, mode, "fp32", "cpu", False)
    compiled = PyTorchGPU(own, mode, "fp32", "cpu", True) if of_every_layer else None
    for first in (0, 2):  # the second time in the caches of the first, with other factors
        rows = [[(7 * i + j * j) % 512 for j in range(20)] for i in range(first, first + 2)]
        laps: list[str] = []
        chosen = eager.generate(rows, 5, laps.append)
        assert laps == ["adapt", "prefill", "decode"]
        adaptation = inference.adapt(own, rows, mode)
        for row, ids in enumerate(rows):
            logits = row_logits(own, [*ids, *chosen[row, :-1].tolist()], adaptation, row)
            assert logits[-5:].argmax(1).tolist() == chosen[row].tolist()
        assert compiled is None or (compiled.generate(rows, 5, laps.append) == chosen).all()


def test_what_does_not_fit_into_the_time_is_listed(bundle: Path, mini: Checkpoint, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_check, "measure_bandwidth", lambda runtime: 1.0)
    figures = check(bundle, mini, deadline=time.monotonic())
    assert figures.timings == []
    assert figures.checks == {}
    assert len(figures.skipped) == 2 + 4 + 2
    assert figures.skipped[0] == "verifying tensorrt: out of time"


def test_a_provider_that_cannot_be_had_is_told(bundle: Path, mini: Checkpoint, monkeypatch: Any) -> None:
    def unavailable(_: Any) -> Any:
        raise ProviderError("no engines")

    monkeypatch.setattr(gpu_check, "measure_bandwidth", lambda runtime: 1.0)
    figures = check(bundle, mini, 0.0, {"tensorrt": unavailable, "cuda": OPENERS["cuda"]})
    assert figures.unavailable == {"tensorrt": "no engines"}
    with pytest.raises(ProviderError, match="tensorrt: no engines"):
        check(bundle, mini, 0.0, {"tensorrt": unavailable})


@pytest.mark.usefixtures("_quick")
def test_pytorch_that_fails_is_left_out(bundle: Path, mini: Checkpoint, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint_checks, "verify_checkpoint", lambda *_: [])
    monkeypatch.setattr(PyTorchGPU, "score", broken)
    figures = check(bundle, mini, openers={"cuda": OPENERS["cuda"]})
    assert figures.skipped == ["scoring: PyTorch eager fp32: RuntimeError: out of memory"]
    assert list(figures.timings[-1].seconds) == ["cuda", "no adaptation"]


def test_a_missing_extra_is_printed_with_its_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    figures = gpu_check.BundleFigures("models/[x]", "fp32")
    figures.unavailable = {"tensorrt": "needs TensorRT: pip install 'chameleon-deploy[tensorrt]'"}
    figures.skipped = ["PyTorch: pip install 'chameleon-deploy[gpu]'"]
    gpu_check.show(figures)
    printed = capsys.readouterr().out
    assert "left out: tensorrt: needs TensorRT: pip install 'chameleon-deploy[tensorrt]'" in printed
    assert "chameleon-deploy[gpu]" in printed
