"""benchmarks/off_grid.py: factors of channels cancel, and weights that were round are round no more."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch

from benchmarks import off_grid
from chameleon_deploy.bench.peers.gguf_writer import write_gguf
from chameleon_deploy.errors import InputError
from chameleon_deploy.reference.model import Trunk, load_trunk, trunk_from
from chameleon_deploy.reference.tiny import save_base
from tests.families import small_model

IDS = torch.arange(40)[None] * 7 % 512


def logits(trunk: Trunk) -> torch.Tensor:
    return trunk.logits(trunk.hidden_states(IDS)[0])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "olmo2", "llama", "qwen2", "qwen3", "phi3"])
def test_logits_stay_what_they_are(family: str) -> None:
    trunk = trunk_from(small_model(family).double(), None)
    before, weights = logits(trunk), {name: x.clone() for name, x in trunk.causal_lm.state_dict().items()}
    off_grid.leave_grid(trunk)
    assert (logits(trunk) - before).abs().max() < 1e-9
    changed = trunk.causal_lm.state_dict()
    if trunk.spec.gated and trunk.spec.names.attention_norm:  # else some matrices have no free factors
        layers = [f"{name}.weight" for name in trunk.linear_layers() if name != "lm_head"]
        assert all((changed[name] != weights[name]).double().mean() > 0.9 for name in layers)
    head = trunk.spec.names.embedding if trunk.is_tied else "lm_head"
    assert trunk.is_tied == bool((changed[f"{head}.weight"] == weights[f"{head}.weight"]).all())


def test_a_rounded_model_is_written_unround(
    tmp_path: Path, mini_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was rounded to a type rounds to it again without an error, before."""
    trunk, kind = load_trunk(mini_path / "base"), gguf.GGMLQuantizationType.Q4_0
    llama = trunk_from(small_model("llama"), trunk.tokenizer)
    for name in llama.linear_layers():
        weight = llama.causal_lm.get_submodule(name).weight
        rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
        weight.copy_(torch.from_numpy(rounded))
    save_base(llama.causal_lm, llama.tokenizer, tmp_path / "round")
    off_grid.main(tmp_path / "round", tmp_path / "unround", seed=1)
    written = load_trunk(tmp_path / "unround")
    assert (logits(written) - logits(llama)).abs().max() < 1e-3
    before, after = off_grid.rounding_errors(llama), off_grid.rounding_errors(written)
    assert before["Q4_0"] < 1e-6
    ordinary = off_grid.rounding_errors(trunk_from(small_model("llama", seed=1), trunk.tokenizer))
    assert after == pytest.approx(ordinary, rel=0.1)
    assert "Q4_0" in capsys.readouterr().out


def write_tokenizer(base: Path, file: Path) -> None:
    """Write the tokenizer of a base model, and a chat template, as a GGUF file without a model."""
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_llama_cpp_has_the_model_and_its_tokenizer(
    tmp_path: Path, mini_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    write_tokenizer(mini_path / "base", tmp_path / "tokenizer.gguf")
    llama, kind = trunk_from(small_model("llama"), None), gguf.GGMLQuantizationType.F32
    write_gguf(llama, tmp_path / "model.gguf", kind, tmp_path / "tokenizer.gguf")
    off_grid.main(tmp_path / "model.gguf", tmp_path / "unround", llama_cpp=tmp_path / "unround.gguf")
    expected, found = (load_trunk(tmp_path / name) for name in ("unround", "unround.gguf"))
    assert (logits(found) - logits(expected)).abs().max() < 1e-5
    assert (logits(found) - logits(llama)).abs().max() < 1e-3
    text = "The river, and 12 boats"
    ids = load_trunk(mini_path / "base").tokenizer.encode(text).ids
    assert found.tokenizer.encode(text).ids == expected.tokenizer.encode(text).ids == ids
    assert found.chat.source() == expected.chat.source() == "{{ messages[0].content }}"


def test_a_model_without_a_tokenizer_for_llama_cpp(tmp_path: Path, mini_path: Path) -> None:
    with pytest.raises(InputError, match="is no GGUF file, whose tokenizer"):
        off_grid.main(mini_path / "base", tmp_path / "out", llama_cpp=tmp_path / "out.gguf")
    assert not any(tmp_path.iterdir())
