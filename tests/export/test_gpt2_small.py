"""GPT-2 small with random weights, at full size: the export's limits, the paper's counts, what loading costs.

`pytest -m large_models tests/export/test_gpt2_small.py` runs every check of `verify` and builds its int8 engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from chameleon_deploy.bench.footprint import measure_footprint
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.reference.random import random_checkpoint
from tests.commands import run

pytestmark = pytest.mark.gpt2_small


def peak_of(*command: object, env: Mapping[str, str] = os.environ) -> int:
    """Run Python with these arguments. Returns its peak resident memory in bytes, which is that of no other process."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    arguments = [sys.executable, "-c", code, *map(str, command)]
    return int(subprocess.run(arguments, env=env, check=True, capture_output=True, text=True).stdout) * 1024


# The command, which verifies a long text and 7 others by one check on each decoder graph: what needs the memory.
EXPORT = """
from functools import partial
from chameleon_deploy.export.__main__ import main
from chameleon_deploy.terminal import console
from chameleon_deploy.verify import checkpoint_checks, run
every, run_steps = run.verification_rows, checkpoint_checks.run_steps
run.verification_rows = lambda *options: every(*options)[-8:]
run.VerifyOptions = partial(run.VerifyOptions, threads=1)
checkpoint_checks.run_steps = lambda runtime, steps, *rest: run_steps(runtime, {"logits": steps["logits"]}, *rest)
console.run(main)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Checkpoint, bundle, and the peak resident memory in bytes of export and verification."""
    directory = tmp_path_factory.mktemp("small")
    checkpoint, bundle = directory / "checkpoint", directory / "bundle"
    random_checkpoint(checkpoint, "small")
    return checkpoint, bundle, peak_of("-c", EXPORT, checkpoint, "--out", bundle)


def test_export_and_verification_fit_4_gib(small: tuple[Path, Path, int]) -> None:
    assert small[2] <= 4 * 2**30
    record = json.loads((small[1] / "parity.json").read_text())
    assert record["verified"], record["checks"]
    read = [check["graph"] for check in record["checks"] if "up to 1024 of a text" in check["note"]]
    assert read == ["decoder_cpu", "decoder"], record["checks"]  # the last position


@pytest.mark.large_models
def test_a_verified_export_fits_4_gib(small: tuple[Path, Path, int], tmp_path: Path) -> None:
    peak = peak_of("-m", "chameleon_deploy.export", small[0], "--out", tmp_path / "bundle")
    assert peak <= 4 * 2**30
    assert open_bundle(tmp_path / "bundle").manifest.parity.verified
    record = json.loads((tmp_path / "bundle" / "parity.json").read_text())
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


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("int8", marks=pytest.mark.large_models)],  # the largest file, and the smallest
)
def test_engines(small: tuple[Path, Path, int], precision: str, tmp_path: Path) -> None:
    """TensorRT for RTX builds them without a GPU, inside the memory that the export may take."""
    checkpoint, bundle, _ = small
    if precision != "fp32":
        bundle = tmp_path / "bundle"
        exported = run("chameleon_deploy.export", checkpoint, "--out", bundle, "--precision", precision, "--no-verify")
        assert exported.returncode == 0, exported.stderr
    environment = {**os.environ, "CHAMELEON_DEPLOY_CACHE": str(tmp_path / "cache")}
    assert peak_of("-m", "chameleon_deploy.engines", bundle, env=environment) <= 4 * 2**30
    (engine,) = (tmp_path / "cache").rglob("decoder.engine")
    assert engine.stat().st_size > 150e6  # in int8, the weights are 124 MB of it
    shutil.rmtree(tmp_path)
