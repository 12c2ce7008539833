"""`benchmarks.adapters`: every engine gives what the reference gives with each row's adapter, or the run fails."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.adapters import VLLM
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.checkpoint import Checkpoint
from tests.adapters import save_adapter
from tests.commands import call

LAYERS = {"mini": ["c_attn", "c_fc"], "llama": ["q_proj", "k_proj", "up_proj"]}
LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None


@pytest.fixture(scope="module")
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path]]:
    """A bundle with two adapters, its base model, and their PEFT directories."""
    checkpoint: Path = request.getfixturevalue(f"{request.param}_path")
    base, out = checkpoint / "base", tmp_path_factory.mktemp(request.param)
    directories = [
        save_adapter(base, out / name, seed, strength=0.3, r=4, target_modules=LAYERS[request.param])
        for seed, name in enumerate("ab")
    ]
    export_bundle(load_adapted(str(base), dict(zip("ab", directories, strict=True))), out / "bundle")
    return out / "bundle", base, directories


def command(bundle: Path, base: Path, directories: list[Path]) -> list[str | Path | int]:
    named = [option for name, path in zip("ab", directories, strict=True) for option in ("--adapter", f"{name}={path}")]
    return [bundle, "--reference", base, *named, "--batch", 3, "--width", 12, "--tokens", 5, "--rounds", 1,
            "--threads", 1]  # fmt: skip


@pytest.mark.parametrize("adapted", LAYERS, indirect=True)
def test_every_engine_is_timed_and_right(
    adapted: tuple[Path, Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    result = call("benchmarks.adapters", *command(*adapted), "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"llama.cpp"} - figures["missing"].keys() == ({"llama.cpp"} if LLAMA_CPP else set())
    alone = {"bundle", "without LoRA", *(["llama.cpp F32"] if LLAMA_CPP else [])}
    mixed = alone | {"one call per adapter", "PyTorch with PEFT"}
    for timing in figures["timings"]:
        assert timing["failed"] == {}
        assert timing["seconds"].keys() == (mixed if timing["part"]["batch"] == 3 else alone)
    assert [timing["part"]["kind"] for timing in figures["timings"]] == ["generation", "prefill", "decode"] * 2
    assert figures["load_seconds"] > 0
    printed = " ".join(result.stdout.split())
    assert "2 adapters of rank 4" in printed
    assert "OMP_WAIT_POLICY=active" in printed


@pytest.mark.parametrize("adapted", ["mini"], indirect=True)
def test_adapters_in_the_wrong_order_are_caught(adapted: tuple[Path, Path, list[Path]]) -> None:
    """The bundle's a is compared with what is b for PEFT and for the reference."""
    bundle, base, directories = adapted
    result = call("benchmarks.adapters", *command(bundle, base, directories[::-1]), "--engine", "none")
    assert result.returncode == 1
    assert "results differ from the reference: prefill 3x12 + 5 tokens" in " ".join(result.stderr.split())


@pytest.mark.parametrize("adapted", ["mini"], indirect=True)
def test_another_bundles_adapters_are_refused(adapted: tuple[Path, Path, list[Path]]) -> None:
    bundle, base, directories = adapted
    result = call("benchmarks.adapters", bundle, "--reference", base, "--adapter", f"a={directories[0]}")
    assert result.returncode == 2
    assert "pass an --adapter for each" in " ".join(result.stderr.split())


@pytest.mark.parametrize("adapted", ["mini"], indirect=True)
def test_vllm_answers_from_an_environment_of_its_own(
    adapted: tuple[Path, Path, list[Path]], tmp_path: Path, mini: Checkpoint
) -> None:
    """A stand-in for its Python: vLLM itself is not installed where tests run."""
    python = tmp_path / "python"
    answers = ['{"opened": true}', '{"lap": "prefill"}', '{"tokens": [[5, 6], [7, 8]]}']
    python.write_text("#!/bin/sh\n" + "read -r asked\n".join(f"echo '{answer}'\n" for answer in answers[:2])
                      + f"echo '{answers[2]}'\necho no more memory >&2\nexit 3\n")  # fmt: skip
    python.chmod(0o755)
    _, _, directories = adapted
    peer = VLLM(python, mini.trunk, tmp_path, dict(zip("ab", directories, strict=True)), ["a", "b"], 1)
    laps: list[str] = []
    assert peer.generate([[1, 2], [3, 4]], 2, laps.append).tolist() == [[5, 6], [7, 8]]
    assert laps == ["prefill", "decode"]
    with pytest.raises(RuntimeError, match="its process ended with exit code 3: no more memory"):
        peer.generate([[1, 2], [3, 4]], 2, laps.append)
