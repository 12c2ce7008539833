"""PEFT directories that replace weights of their base become a base of their own, which computes what peft computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.contract.peft_lora import read_peft
from chameleon_deploy.errors import ChameleonError, CheckpointError, TensorError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference import merging
from chameleon_deploy.reference.adapters import AdaptedBase, load_adapted
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.source import load_source
from chameleon_deploy.reference.tiny import train_tokenizer
from tests.adapters import peft_logits, save_adapter
from tests.devices import on_cpu

ROW = [5, 9, 301, 17, 44, 8, 121]
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}
LAYER = {"gpt2": "c_attn", "llama": "q_proj"}
# Of the embedding E, the head H and a linear layer L.
CASES: dict[str, dict[str, Any]] = {
    "whole embedding and head": {"modules_to_save": ["E", "H"]},
    "whole embedding": {"modules_to_save": ["E"]},
    "whole head": {"modules_to_save": ["H"]},
    "whole embedding, tied": {"modules_to_save": ["E"], "ensure_weight_tying": True},
    "larger vocabulary": {"vocabulary": 520},
    "smaller vocabulary": {"vocabulary": 400},
    "larger vocabulary, trained": {"vocabulary": 520, "modules_to_save": ["E", "H"]},
    "larger vocabulary, embedding trained": {"vocabulary": 520, "modules_to_save": ["E"]},
    "all biases": {"bias": "all"},
    "biases of updated layers": {"bias": "lora_only"},
    "trained tokens": {"trainable_token_indices": [5, 9]},
    "trained tokens of a larger vocabulary": {"vocabulary": 520, "trainable_token_indices": [5, 515]},
    "trained tokens by name": {"trainable_token_indices": {"E": [5, 301]}},
    "update of the embedding": {"target_modules": ["L", "E"]},
    "update of embedding and head": {"target_modules": ["L", "E", "H"], "use_rslora": True},
    "norms": {"modules_to_save": ["ln_f", "norm"], "rank_pattern": {"L": 3}, "alpha_pattern": {"L": 7}},
    "plain": {"target_modules": ["L", "down_proj", "c_fc"]},
}
Options = dict[str, Any]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, mini_path: Path, llama_path: Path) -> tuple[str, Path]:
    """A GPT-2, whose head is its embedding and whose layers have biases, and a Llama, which is neither."""
    return request.param, {"gpt2": mini_path, "llama": llama_path}[request.param] / "base"


def options_of(family: str, case: str) -> Options:
    """Return the options of a case in a family's names."""
    own = {"E": EMBEDDING[family], "H": "lm_head", "L": LAYER[family]}

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {own.get(key, key): item for key, item in value.items()}
        return [own.get(item, item) for item in value] if isinstance(value, list) else value

    options = {"r": 2, "lora_alpha": 6, "target_modules": ["L"]} | CASES[case]
    return {name: named(value) for name, value in options.items()}


def saved(family: str, path: Path, out: Path, case: str) -> tuple[Path, Any]:
    """Return the directory of a case and peft's logits of ROW with it."""
    options = options_of(family, case)
    directory = save_adapter(path, out / "adapter", **options)
    return directory, peft_logits(path, directory, [ROW], options.get("vocabulary"))[0]


def change_config(directory: Path, **options: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


@torch.no_grad()
def logits_of(trunk: Trunk) -> Any:
    return trunk.logits(trunk.hidden_states(torch.tensor([ROW]))[0])[0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_a_merged_base_computes_what_peft_computes(case: str, base: tuple[str, Path], tmp_path: Path) -> None:
    directory, expected = saved(*base, tmp_path, case)
    source = load_source(directory, None, {})
    assert isinstance(source, AdaptedBase)
    np.testing.assert_allclose(logits_of(source.trunk), expected, atol=5e-5)
    plain = peft_logits(base[1], None, [ROW])[0]
    known = min(plain.shape[1], expected.shape[1])
    assert np.abs(expected[:, :known] - plain[:, :known]).max() > 0.05


@pytest.mark.parametrize("case", ["larger vocabulary, trained", "all biases"])
def test_its_bundle_computes_what_peft_computes(case: str, base: tuple[str, Path], tmp_path: Path) -> None:
    directory, expected = saved(*base, tmp_path, case)
    export_bundle(load_source(directory, None, {}), tmp_path / "bundle")
    runtime = on_cpu(open_bundle(tmp_path / "bundle"), "decoder_cpu")
    factors = runtime.adapt([ROW], mode="none").factors
    (logits,) = (np.asarray(part)[0].copy() for _, part in runtime.decoder.all_logits([ROW], factors))
    np.testing.assert_allclose(logits, expected, atol=5e-5)


def forgotten(*_: Any) -> None:
    """In place of what changes weights."""


def shared(model: Any, name: str, tensor: Any) -> None:
    """In place of `merging._replace`: a module that shares its weight changes the other's."""
    model.get_parameter(name).data = tensor


FAULTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "trained rows are forgotten": ("trained tokens", "_train_rows", forgotten),
    "updates are forgotten": ("plain", "_replace", forgotten),
    "a tied head follows the embedding": ("whole embedding", "_replace", shared),
    "whole weights are taken for the base's": ("whole head", "_is_saved", lambda config, name: False),
}


@pytest.mark.parametrize(("case", "function", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_merge_is_seen(
    case: str, function: str, fault: Any, mini_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, expected = saved("gpt2", mini_path / "base", tmp_path, case)
    monkeypatch.setattr(merging, function, fault)
    assert np.abs(logits_of(merging.load_merged(directory)) - expected).max() > 0.05


def test_rows_that_share_a_base_are_refused_with_the_command(base: tuple[str, Path], tmp_path: Path) -> None:
    family, path = base
    for case in ("whole head", "larger vocabulary", "all biases", "trained tokens", "update of the embedding"):
        directory, _ = saved(family, path, tmp_path / case.replace(" ", "-"), case)
        with pytest.raises(ChameleonError, match=f"python -m chameleon_deploy.export {directory} --out BUNDLE"):
            load_adapted(str(path), {"own": directory})


def test_a_tokenizer_in_the_directory_is_the_bundles(mini_path: Path, tmp_path: Path) -> None:
    directory, _ = saved("gpt2", mini_path / "base", tmp_path, "larger vocabulary")
    tokenizer = train_tokenizer(["a b c d", "some words"], 300)
    tokenizer.add_tokens(["<answer>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    trunk = merging.load_merged(directory)
    assert trunk.tokenizer.to_str() == tokenizer.to_str()
    assert len(trunk.token_embedding) == 520


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "no such weight": lambda tensors: tensors.update({"base_model.model.transformer.nothing.bias": torch.zeros(3)}),
    "another shape": lambda tensors: tensors.update({"base_model.model.transformer.ln_f.bias": torch.zeros(3)}),
    "two vocabularies": lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(9, 64)}),
    "a missing layer": lambda tensors: [tensors.pop(name) for name in list(tensors) if ".h.1." in name],
    "NaN": lambda tensors: next(iter(tensors.values())).fill_(torch.nan),
    "too few rows": lambda tensors: tensors.update(
        {"base_model.model.transformer.wte.token_adapter.trainable_tokens_delta": torch.zeros(1, 64)}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_are_refused(damage: Callable[..., Any], mini_path: Path, tmp_path: Path) -> None:
    options = options_of("gpt2", "larger vocabulary") | {"trainable_token_indices": [5, 9]}
    directory = save_adapter(mini_path / "base", tmp_path / "adapter", **options)
    tensors = load_file(directory / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(TensorError, match="adapter"):
        merging.load_merged(directory)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, ("use_dora", "rescales", "merge_and_unload")),
        ({"lora_bias": True}, ("lora_bias", "merge_and_unload")),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights=pissa", "path_initial_model_for_weight_conversion")),
        ({"init_lora_weights": "olora"}, ("init_lora_weights=olora", "path_initial_model_for_weight_conversion")),
        ({"target_parameters": ["c_attn.weight"]}, ("target_parameters", "target_modules")),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_is_no_plain_update_is_refused_with_the_reason(
    options: Options, words: tuple[str, ...], mini_path: Path, tmp_path: Path
) -> None:
    """Shared by rows or merged."""
    directory = save_adapter(mini_path / "base", tmp_path / "adapter", r=2, target_modules=["c_fc"])
    change_config(directory, **options)
    for read in (lambda: read_peft(directory, {}), lambda: load_source(directory, None, {})):
        with pytest.raises(CheckpointError) as refused:
            read()
        assert all(word in str(refused.value) for word in words)


def test_a_base_that_is_not_named_is_asked_for(mini_path: Path, tmp_path: Path) -> None:
    directory, expected = saved("gpt2", mini_path / "base", tmp_path, "all biases")
    change_config(directory, base_model_name_or_path=None)
    with pytest.raises(ChameleonError, match="pass --base"):
        load_source(directory, None, {})
    source = load_source(directory, str(mini_path / "base"), {})
    np.testing.assert_allclose(logits_of(source.trunk), expected, atol=5e-5)
