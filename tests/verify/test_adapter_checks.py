"""`verify` passes a right bundle with adapters and catches wrong ones, whose faults are planted in its own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chameleon_deploy.bundle import AdaptationSpec
from chameleon_deploy.errors import InputError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import AdaptedBase, load_adapted
from chameleon_deploy.verify import adapter_checks, faults
from chameleon_deploy.verify.run import verify_bundle
from tests.adapters import LLAMA_LAYERS, save_adapter
from tests.damage import reseal


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def adapted(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AdaptedBase:
    path = tmp_path_factory.mktemp("peft")
    directories = {
        "legal": save_adapter(llama_path / "base", path / "legal", 1, r=4, lora_alpha=12, target_modules=LLAMA_LAYERS),
        "code": save_adapter(llama_path / "base", path / "code", 2, r=2, lora_alpha=1, target_modules=["q_proj"]),
    }
    return load_adapted(str(llama_path / "base"), directories)


@pytest.fixture(scope="module")
def path(adapted: AdaptedBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "adapters"
    export_bundle(adapted, out, None)
    return out


def test_a_right_bundle_passes_every_check(path: Path, adapted: AdaptedBase) -> None:
    checks, record = verify_bundle(path, adapted, None, 1, silent)
    assert record["verified"], [check for check in checks if not check.passed]
    names = {check.name for check in checks}
    assert {"mixed adapters: logits, max abs difference", "adapter code: update, relative difference"} <= names
    assert {f"caught: {fault}" for fault in adapter_checks.MUTATIONS} <= names
    assert {check.graph for check in checks} == {"decoder", "decoder_cpu"}


def _undo_scaling(spec: AdaptationSpec, stacks: Any) -> Any:
    """Drop alpha / rank = 3 of the first adapter."""
    changed = {name: stack.copy() for name, stack in stacks.items()}
    for name in changed:
        if name.endswith(".lora_B"):
            changed[name][0] /= 3
    return changed


def _one_layer_of_zeros(spec: AdaptationSpec, stacks: Any) -> Any:
    return stacks | {"model.layers.1.mlp.down_proj.lora_B": stacks["model.layers.1.mlp.down_proj.lora_B"] * 0}


@pytest.mark.parametrize(
    "fault", [adapter_checks.another_adapter, faults.swapped_layers, _undo_scaling, _one_layer_of_zeros]
)
def test_wrong_factors_in_the_bundle_are_caught(
    fault: Callable[[AdaptationSpec, Any], Any], path: Path, adapted: AdaptedBase, copy_of: Callable[[Path], Path]
) -> None:
    from chameleon_deploy.bundle import open_bundle

    damaged = copy_of(path)
    stacks = load_file(damaged / "lora.safetensors")
    spec = open_bundle(path).manifest.adaptation
    save_file({n: np.ascontiguousarray(a) for n, a in fault(spec, stacks).items()}, damaged / "lora.safetensors")
    reseal(damaged)
    checks, record = verify_bundle(damaged, adapted, None, 1, silent)
    assert not record["verified"]
    missed = {check.name for check in checks if not check.passed}
    assert "mixed adapters: logits, max abs difference" in missed  # by what the model computes, not only by its files
    assert "adapter legal: factors, max abs difference" in missed


def test_a_decoder_that_drops_an_update_is_caught(
    path: Path, adapted: AdaptedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime binds zeros for one layer: the files are right, the rows are not."""
    from chameleon_deploy.runtime import adapters
    from chameleon_deploy.runtime.factors import stack_sets

    def without_a_layer(stacks: Any) -> Any:
        sets = stack_sets(stacks)
        dropped = {n: np.zeros_like(a) if "layers.0.self_attn.q_proj" in n else a for n, a in sets.tensors.items()}
        return type(sets)(dropped)

    monkeypatch.setattr(adapters, "stack_sets", without_a_layer)
    checks, _ = verify_bundle(path, adapted, None, 1, silent)
    missed = {check.name for check in checks if not check.passed}
    assert {"mixed adapters: logits, max abs difference", "adapter code: update, relative difference"} <= missed


def test_the_adapters_must_be_the_bundles(path: Path, adapted: AdaptedBase, mini_path: Path) -> None:
    one = AdaptedBase(adapted.name, adapted.trunk, {"legal": adapted.adapters["legal"]}, adapted.base_digest, "")
    with pytest.raises(InputError, match="legal, code"):
        verify_bundle(path, one, None, 1, silent)
    other = AdaptedBase("gpt2", adapted.trunk, adapted.adapters, "0" * 64, "")
    with pytest.raises(InputError, match="base model"):
        verify_bundle(path, other, None, 1, silent)
