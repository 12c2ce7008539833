"""benchmarks/loading.py: every engine loads in a process of its own, and one that fails is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import loading
from benchmarks.loading import Loadable
from chameleon_deploy.errors import CheckFailedError
from tests.commands import call


def test_each_engine_is_loaded(llama_bundle: Path, llama_path: Path, tmp_path: Path) -> None:
    result = call("benchmarks.loading", llama_bundle, "--reference", llama_path, "--threads", 1, "--rounds", 1,
                  "--json", tmp_path / "loading.json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "loading.json").read_text())
    assert {"bundle fp32", "CTranslate2 fp32", "OpenVINO fp32", "PyTorch eager fp32"} <= set(found)
    for one in found.values():
        assert 0 < one["seconds"] < 60
        assert 2**24 < one["resident"] <= one["peak"]
    # PyTorch alone is larger than a runtime that does not import it
    assert found["bundle fp32"]["resident"] < found["PyTorch eager fp32"]["resident"]
    weights = sum(file.stat().st_size for file in llama_bundle.iterdir())
    assert found["bundle fp32"]["size"] == weights
    parameters = (llama_path / "base/model.safetensors").stat().st_size
    assert all(one["size"] > 0.9 * parameters for one in found.values())


def test_an_engine_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError, match="the broken one: exit code 1"):
        loading.measure({"the broken one": Loadable("bundle", tmp_path)}, "fp32", 1, 1, lambda *_: None)
