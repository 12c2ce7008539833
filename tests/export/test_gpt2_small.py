"""GPT-2 small with random weights, at full size: the export's limits, the paper's counts, what loading costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chameleon_deploy.bench.footprint import measure_footprint
from chameleon_deploy.contract.bundle import open_bundle
from tests.commands import run

pytestmark = pytest.mark.gpt2_small


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Checkpoint, verified bundle, and the export's peak resident memory in bytes."""
    directory = tmp_path_factory.mktemp("small")
    checkpoint, bundle = directory / "checkpoint", directory / "bundle"
    random = [sys.executable, "-m", "chameleon_deploy.reference.random", "--size", "small", "--out", str(checkpoint)]
    subprocess.run(random, check=True, capture_output=True)
    # A process of its own, so that its peak is nobody else's.
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'chameleon_deploy.export', *sys.argv[1:]], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, checkpoint, "--out", bundle], check=True, capture_output=True, text=True
    )
    return checkpoint, bundle, int(result.stdout.splitlines()[-1]) * 1024


def test_export_is_verified_and_fits_4_gib(small: tuple[Path, Path, int]) -> None:
    _, bundle, peak = small
    assert peak <= 4 * 2**30
    manifest = open_bundle(bundle).manifest
    assert manifest.parity.verified
    record = json.loads((bundle / "parity.json").read_text())
    assert all(check["passed"] for check in record["checks"])
    assert any(
        "up to 1024 of a text" in check["note"] for check in record["checks"]
    )  # the model's last position was reached


def test_the_papers_counts_are_in_the_manifest(small: tuple[Path, Path, int]) -> None:
    parameters = open_bundle(small[1]).manifest.parameters
    assert (parameters.base, parameters.factors, parameters.hypernetwork) == (124_439_808, 204_100, 6_786_596)


def test_the_bundle_is_no_larger_than_its_weights(small: tuple[Path, Path, int]) -> None:
    assert sum(file.stat().st_size for file in small[1].iterdir()) <= 1.02 * (498 + 27) * 1e6


def test_loading_costs_little_more_than_the_weights(small: tuple[Path, Path, int]) -> None:
    figures = measure_footprint(small[1], threads=2, rounds=1)
    weights = (small[1] / "weights.bin").stat().st_size
    assert figures.resident <= 1.35 * weights
    assert figures.peak <= 1.5 * weights
    assert figures.shared_private <= 60 * 2**20


@pytest.mark.parametrize("precision", ["fp32", "int8"])  # the largest file, and the smallest
def test_engines(small: tuple[Path, Path, int], precision: str, tmp_path: Path) -> None:
    """TensorRT for RTX builds them without a GPU, inside the memory that the export may take."""
    checkpoint, bundle, _ = small
    if precision != "fp32":
        bundle = tmp_path / "bundle"
        exported = run("chameleon_deploy.export", checkpoint, "--out", bundle, "--precision", precision, "--no-verify")
        assert exported.returncode == 0, exported.stderr
    program = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    environment = {**os.environ, "CHAMELEON_DEPLOY_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-c", program, sys.executable, "-m", "chameleon_deploy.engines", bundle],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(result.stdout.splitlines()[-1]) * 1024 <= 4 * 2**30
    (engine,) = (tmp_path / "cache").rglob("decoder.engine")
    assert engine.stat().st_size > 150e6  # in int8, the weights are 124 MB of it
    shutil.rmtree(tmp_path)
