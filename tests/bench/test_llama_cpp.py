"""llama.cpp as a peer. Without the package the bench says so; the file that it reads is checked without it, too."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import transformers

import chameleon_deploy
from chameleon_deploy.bench.peers import _foreign, open_peers
from chameleon_deploy.bench.peers.gguf_writer import write_gguf
from chameleon_deploy.bench.quality import Quality, measure_quality, text_windows
from chameleon_deploy.bench.workloads import Workloads, text_rows
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.gguf import ARCHITECTURES, Architecture
from chameleon_deploy.reference.model import Trunk
from tests.conftest import checkpoint_around

IS_INSTALLED = importlib.util.find_spec("llama_cpp") is not None
NOT_INSTALLED = "llama_cpp is not installed: pip install 'chameleon-deploy[peers-llama]'"


@pytest.fixture(scope="module", params=["mini_path", "llama_path"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    path: Path = request.getfixturevalue(request.param)
    return load_checkpoint(path)


@pytest.mark.parametrize(("kind", "precision", "name"), [("fp32", "fp32", "F32"), ("int8", "int8", "Q8_0")])
def test_it_gives_what_the_reference_gives_or_is_reported(
    kind: str, precision: str, name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    export_bundle(checkpoint, tmp_path / "bundle", precision="fp32" if precision == "fp32" else "int8")
    runtime = chameleon_deploy.load(tmp_path / "bundle", threads=1)
    peers, missing = open_peers(runtime, checkpoint, 1, tmp_path, foreign=True, only=[f"llama.cpp {name}"])
    if not IS_INSTALLED:
        assert missing == {f"llama.cpp {name}": NOT_INSTALLED}
        return
    peer = peers[1]
    assert peer.name == f"llama.cpp {name}"
    rows = text_rows(checkpoint, 6, 24)
    work = Workloads(runtime, checkpoint, [peer])
    for engine in (work.scoring(rows).contestants[peer.name], work.generation(rows, 5).contestants[peer.name]):
        laps: list[str] = []
        assert engine.deviation(engine.run(laps.append)) <= engine.bound
        assert laps in ([], ["prefill", "decode"])
    windows = text_windows(checkpoint.trunk, [], 3, 40)
    quality = measure_quality([peer], checkpoint.trunk, windows, lambda *_: None)[peer.name]
    assert isinstance(quality, Quality)
    assert quality.mean_kl < (1e-7 if precision == "fp32" else 1e-3)
    assert quality.size < (1.5e6 if precision == "fp32" else 5e5)


def check_file(trunk: Trunk, directory: Path) -> None:
    """transformers reads the same model from it; a matrix that is stored otherwise would change its logits."""
    write_gguf(trunk, directory / "model.gguf", gguf.GGMLQuantizationType.F32)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        directory, gguf_file="model.gguf", config=copy.deepcopy(trunk.config), dtype=torch.float32
    )
    ids = torch.arange(48).reshape(2, 24) * 7 % trunk.config.vocab_size
    with torch.no_grad():
        difference = read.eval()(ids).logits - trunk.causal_lm(ids).logits
    assert difference.abs().max() < 1e-4


def test_the_file_has_the_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    check_file(checkpoint.trunk, tmp_path)


SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def test_the_file_of_a_family_whose_rotation_is_of_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = checkpoint_around(transformers.Qwen2Config(**SIZES)).trunk
    check_file(trunk, tmp_path)
    monkeypatch.setitem(ARCHITECTURES, "qwen2", Architecture("qwen2", interleaved=True))
    with pytest.raises(AssertionError):
        check_file(trunk, tmp_path)


def test_the_own_file_of_a_base_is_not_quantised(
    mini: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What bench writes itself is, beside it."""
    opened: list[tuple[dict[str, str], Path]] = []

    def own_process(opener: Any, file: Path, *_: object) -> None:
        opened.append((getattr(opener, "keywords", {}), file))

    monkeypatch.setattr("chameleon_deploy.bench.peers.own_process.OwnProcess", own_process)
    monkeypatch.setattr(mini.trunk, "gguf", tmp_path / "own.gguf")
    runtime: Any = SimpleNamespace(manifest=SimpleNamespace(precision="int4"))
    openers = _foreign(runtime, mini, 1, tmp_path)
    for name in ("llama.cpp, the file's own type", "llama.cpp Q4_K_M"):
        openers[name]()
    assert opened == [({}, tmp_path / "own.gguf"), ({"mix": "Q4_K_M"}, tmp_path / "int4.gguf")]


def test_a_family_that_is_not_compared(mini: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini.trunk.config, "model_type", "granite")
    with pytest.raises(ValueError, match="no comparison with the family 'granite'"):
        write_gguf(mini.trunk, tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)


def test_heads_that_are_not_a_part_of_the_hidden_size_are_not_compared(tmp_path: Path) -> None:
    trunk = checkpoint_around(transformers.LlamaConfig(**SIZES, head_dim=32)).trunk
    with pytest.raises(ValueError, match="no comparison with heads of 32 channels"):
        write_gguf(trunk, tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)
