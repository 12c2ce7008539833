"""`adapter`: updates that a bundle generates become PEFT LoRAs. tests/runtime/test_adapters.py writes adapter files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.peft_lora import read_peft
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from tests.adapters import peft_logits
from tests.commands import call
from tests.shared_data import good_bundle

TEXT = "The river runs to the sea.\n\nAnd back."


@pytest.fixture(scope="module", params=["mini", "llama-mini"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a hypernetwork for all layers of a GPT-2 and of a Llama, and its bundles in fp32 and int8."""
    path = tmp_path_factory.mktemp(request.param)
    random_checkpoint(path / "checkpoint", request.param, targets=["all"])
    for precision in ("fp32", "int8"):
        export_bundle(load_checkpoint(path / "checkpoint"), path / precision, precision=precision)
    (path / "text.txt").write_text(TEXT)
    return path


def write(bundle: Path, out: Path, *source: Any) -> Path:
    result = call("chameleon_deploy.adapter", bundle, *source, "--out", out)
    assert result.returncode == 0, result.stderr
    return out


def logprobs(logits: Any, ids: Sequence[int]) -> list[float]:
    """Return the log-probability of every token after the first."""
    rows = torch.tensor(logits).log_softmax(-1)
    return [float(row[token_id]) for row, token_id in zip(rows, ids[1:], strict=False)]


def test_peft_computes_with_the_directory_what_the_bundle_computes(path: Path, tmp_path: Path) -> None:
    runtime, base = chameleon_deploy.load(path / "fp32", threads=1), path / "checkpoint" / "base"
    ids = runtime.encode([TEXT])[0]
    of_text = write(path / "fp32", tmp_path / "text", "--text", path / "text.txt")
    (score,) = runtime.score([ids], mode="request")
    np.testing.assert_allclose(logprobs(peft_logits(base, of_text, [ids])[0], ids), score.token_logprobs, atol=1e-4)
    (plain,) = runtime.score([ids], mode="none")
    assert np.abs(np.subtract(plain.token_logprobs, score.token_logprobs)).max() > 1e-3  # the update is seen
    cluster = runtime.embed([ids])[1][0]
    of_cluster = write(path / "fp32", tmp_path / "cluster", "--cluster", cluster)
    (score,) = runtime.score([ids], mode="centroid")
    np.testing.assert_allclose(logprobs(peft_logits(base, of_cluster, [ids])[0], ids), score.token_logprobs, atol=1e-4)


def test_a_directory_of_an_int8_bundle_is_that_of_fp32(path: Path, tmp_path: Path) -> None:
    """Its factors are of plain layers, not of rotated ones."""
    spec = chameleon_deploy.load(path / "fp32", threads=1).manifest.adaptation
    layers = {target.name: (target.in_features, target.out_features) for target in spec.targets}
    found = [
        read_peft(write(path / precision, tmp_path / precision, "--cluster", 0), layers)
        for precision in ("fp32", "int8")
    ]
    assert found[0].keys() == found[1].keys() == spec.factor_widths.keys()
    for name, array in found[0].items():
        assert np.abs(found[1][name] - array).max() <= 0.02 * np.abs(array).max(), name


def test_a_vector_of_the_caller(tmp_path: Path) -> None:
    bundle, vector = good_bundle("chameleon_given"), tmp_path / "vector.json"
    runtime: Runtime = chameleon_deploy.load(bundle, threads=1)
    spec = runtime.manifest.adaptation
    numbers = [0.5] * spec.conditioning_size
    vector.write_text(json.dumps(numbers))
    layers = {target.name: (target.in_features, target.out_features) for target in spec.targets}
    factors = read_peft(write(bundle, tmp_path / "out", "--conditioning", vector), layers)
    expected = runtime.adapt([[5, 9]], conditioning=[numbers]).factors.sets.tensors
    assert all(np.array_equal(np.asarray(array)[0], factors[name]) for name, array in expected.items())
    for wrong in ("[1]", "{}", "[1e999]", '["a"]', "7"):
        vector.write_text(wrong)
        result = call("chameleon_deploy.adapter", bundle, "--conditioning", vector, "--out", tmp_path / "no")
        assert result.returncode == 2


@pytest.mark.parametrize("path", ["mini"], indirect=True)
def test_what_cannot_be_meant_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "exists").mkdir()
    out, text = tmp_path / "out", path / "text.txt"
    for bundle, words in (
        (path / "fp32", ["--out", out]),
        (path / "fp32", ["--out", out, "--text", text, "--cluster", 0]),
        (path / "fp32", ["--out", out, "--cluster", 99]),
        (path / "fp32", ["--out", out, "--text", tmp_path / "missing"]),
        (path / "fp32", ["--out", out, "--text", tmp_path / "empty.txt"]),
        (path / "fp32", ["--out", out, "--conditioning", text]),
        (path / "fp32", ["--out", tmp_path / "exists", "--cluster", 0]),
        (good_bundle("chameleon_given"), ["--out", out, "--cluster", 0]),
        (good_bundle("lora_masked"), ["--out", out, "--text", text]),
    ):
        result = call("chameleon_deploy.adapter", bundle, *words)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), (words, result.stderr)
    assert not out.exists()
