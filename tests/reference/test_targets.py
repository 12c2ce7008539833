"""The linear layers that factors update: chosen by group or name, and refused where a checkpoint names others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chameleon_deploy.errors import CheckpointError, InputError
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.targets import choose_targets, target_specs

Q = "model.layers.0.self_attn.q_proj"


def test_groups_are_the_models_layers_in_its_order(mini: Checkpoint, llama: Checkpoint) -> None:
    for trunk, attention, mlp in ((mini.trunk, 2, 2), (llama.trunk, 4, 3)):
        layers = list(trunk.linear_layers())
        assert choose_targets(trunk, ["all"]) == tuple(layers)
        assert choose_targets(trunk, ["lm_head"]) == ("lm_head",)
        chosen = [choose_targets(trunk, [group]) for group in ("attention", "mlp")]
        assert [len(names) for names in chosen] == [2 * attention, 2 * mlp]  # of two layers
        assert choose_targets(trunk, ["lm_head", "mlp", "attention"]) == tuple(layers)


def test_names_are_whole_or_ends_as_in_peft(llama: Checkpoint) -> None:
    assert choose_targets(llama.trunk, [Q]) == (Q,)
    assert choose_targets(llama.trunk, ["v_proj", "q_proj"]) == tuple(
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"
    )
    for name in ("proj", "c_attn", ""):
        with pytest.raises(InputError, match="no linear layer is named"):
            choose_targets(llama.trunk, ["attention", name])


def test_sizes_are_the_layers(llama: Checkpoint, mini: Checkpoint) -> None:
    (target,) = target_specs(mini.trunk, ["transformer.h.1.attn.c_attn"])  # a Conv1D
    assert (target.in_features, target.out_features) == (64, 192)
    (target,) = target_specs(llama.trunk, ["model.layers.0.self_attn.k_proj"])
    assert (target.in_features, target.out_features) == (64, 32)


@pytest.mark.parametrize("targets", [[], ["lm_head", "lm_head"], [Q]])
def test_a_checkpoint_with_wrong_targets(mini_path: Path, tmp_path: Path, targets: list[str]) -> None:
    config = json.loads((mini_path / "chameleon_config.json").read_text())
    (tmp_path / "chameleon_config.json").write_text(json.dumps(config | {"targets": targets}))
    (tmp_path / "chameleon.safetensors").write_bytes((mini_path / "chameleon.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="targets"):
        load_checkpoint(tmp_path, base=str(mini_path / "base"))
