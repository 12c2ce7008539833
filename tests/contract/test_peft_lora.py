"""PEFT directories: what peft itself writes is read as peft computes it, everything else is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chameleon_deploy.contract.adapter_file import MAX_RANK
from chameleon_deploy.contract.peft_lora import read_peft
from chameleon_deploy.errors import CheckpointError, TensorError
from chameleon_deploy.reference.adapters import AdapterLogits, load_adapted
from chameleon_deploy.reference.model import Trunk, load_trunk
from tests.adapters import GPT2_LAYERS, LLAMA_LAYERS, peft_logits, save_adapter

ROW = [5, 9, 301, 17, 44, 8, 121]


@pytest.fixture(scope="module")
def gpt2_base(mini_path: Path) -> Path:
    return mini_path / "base"


@pytest.fixture(scope="module")
def trunk(gpt2_base: Path) -> Trunk:
    return load_trunk(gpt2_base)


@pytest.fixture
def saved(gpt2_base: Path, tmp_path: Path) -> Path:
    """An adapter of rank 4 of all layers, to be damaged."""
    return save_adapter(gpt2_base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=GPT2_LAYERS)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "lora_alpha": 3, "target_modules": LLAMA_LAYERS},
    "rank 8, rsLoRA": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LLAMA_LAYERS,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"v_proj": 32, "1.self_attn.o_proj": 1},
    },
    "regex": {"r": 2, "lora_alpha": 2, "target_modules": r".*\.1\.(self_attn|mlp)\.(k|down)_proj"},
    "all linear layers": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
    "one layer": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "without some": {"r": 2, "lora_alpha": 2, "target_modules": LLAMA_LAYERS, "exclude_modules": ["gate_proj"]},
    "head": {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head", "o_proj"]},
    "EVA": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "orthogonal": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_of_a_llama_computes_what_peft_computes(
    options: dict[str, Any], llama_path: Path, tmp_path: Path
) -> None:
    base = llama_path / "base"
    directory = save_adapter(base, tmp_path / "adapter", **options)
    reference = AdapterLogits(load_adapted(str(base), {"own": directory}))
    (expected,), (plain,) = peft_logits(base, directory, [ROW]), peft_logits(base, None, [ROW])
    np.testing.assert_allclose(reference(ROW, ["own"], 0).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(reference(ROW, [None], 0).numpy(), plain, atol=2e-5)
    assert np.abs(expected - plain).max() > 0.05


def test_an_adapter_of_a_gpt2_computes_what_peft_computes(saved: Path, gpt2_base: Path) -> None:
    reference = AdapterLogits(load_adapted(str(gpt2_base), {"own": saved}))
    np.testing.assert_allclose(reference(ROW, ["own"], 0).numpy(), peft_logits(gpt2_base, saved, [ROW])[0], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["ln_f"]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_no_plain_low_rank_update_is_refused_by_name(
    options: dict[str, Any], gpt2_base: Path, trunk: Trunk, tmp_path: Path
) -> None:
    directory = save_adapter(gpt2_base, tmp_path / "adapter", r=2, target_modules=["c_attn"], **options)
    with pytest.raises(CheckpointError, match=next(iter(options))):
        read_peft(directory, trunk.linear_layers(), trunk.head_weight)


ENDLESS = "(.|[a-z0-9._])+(?<=X)"  # takes two to the power of the length of the name


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"some_future_option": {"a": 1}},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [-3]},
        {"alora_invocation_tokens": [3] * 257},
        {"alora_invocation_tokens": "a text"},
        {"r": 10**9},
        {"r": 0},
        {"r": "four"},
        {"rank_pattern": {"c_attn": MAX_RANK + 1}},
        {"lora_alpha": 1e999},
        {"target_modules": "(("},
        {"rank_pattern": {"((": 2}},
        {"target_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 2}},
        {"alpha_pattern": {ENDLESS: 2}},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS},
    ],
    ids=lambda change: f"{next(iter(change))}",
)
def test_a_configuration_that_makes_no_sense_is_refused(change: dict[str, Any], saved: Path, trunk: Trunk) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match="adapter_config"):
        read_peft(saved, trunk.linear_layers(), trunk.head_weight)


A, B = (f"base_model.model.transformer.h.1.mlp.c_fc.lora_{part}.weight" for part in "AB")
Tensors = dict[str, torch.Tensor]
DAMAGE: dict[str, Callable[[Tensors], Any]] = {
    "a missing layer": lambda tensors: (tensors.pop(A), tensors.pop(B)),
    "a missing B": lambda tensors: tensors.pop(B),
    "another rank": lambda tensors: tensors.update({A: torch.zeros(3, 64)}),
    "another width": lambda tensors: tensors.update({A: torch.zeros(4, 65)}),
    "one axis": lambda tensors: tensors.update({A: torch.zeros(256)}),
    "NaN": lambda tensors: tensors[A].fill_(torch.nan),
    "infinity": lambda tensors: tensors[B].fill_(torch.inf),
    "integers": lambda tensors: tensors.update({A: torch.zeros(4, 64, dtype=torch.int32)}),
    "float8": lambda tensors: tensors.update({A: tensors[A].to(torch.float8_e4m3fn)}),
    "float64 beyond float32": lambda tensors: tensors.update({A: torch.full((4, 64), 1e300, dtype=torch.float64)}),
    "an unknown layer": lambda tensors: tensors.update(
        {A.replace("h.1", "h.7"): tensors[A].clone(), B.replace("h.1", "h.7"): tensors[B].clone()}
    ),
    "a magnitude": lambda tensors: tensors.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}),
    "another head": lambda tensors: tensors.update(
        {"base_model.model.lm_head.base_layer.weight": torch.zeros(512, 64)}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_the_configuration_are_refused(
    damage: Callable[[Tensors], Any], saved: Path, trunk: Trunk
) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(TensorError):
        read_peft(saved, trunk.linear_layers(), trunk.head_weight)


def test_a_scaling_beyond_float32_is_refused(saved: Path, trunk: Trunk) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 1e308}))
    with pytest.raises(TensorError, match="scaled by"):
        read_peft(saved, trunk.linear_layers(), trunk.head_weight)


@pytest.mark.parametrize("kind", ["fifo", "endless", "large"])
def test_a_configuration_that_is_no_plain_small_file_is_refused(kind: str, saved: Path, trunk: Trunk) -> None:
    file = saved / "adapter_config.json"
    content = file.read_bytes()
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(content + b" " * 2**20)
    with pytest.raises(CheckpointError, match="adapter_config"):
        read_peft(saved, trunk.linear_layers(), trunk.head_weight)


def test_a_directory_without_tensors_or_with_a_cut_file_is_refused(saved: Path, trunk: Trunk) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        read_peft(saved, trunk.linear_layers())
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read_peft(saved, trunk.linear_layers())
