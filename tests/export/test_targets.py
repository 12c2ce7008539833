"""Generated factors of any linear layers, from a checkpoint to a verified bundle, in both architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import external_data_helper

import chameleon_deploy
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import InputError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.random import random_checkpoint
from chameleon_deploy.verify import wrong_factors
from chameleon_deploy.verify.run import VerifyOptions, verify_bundle
from tests.damage import reseal
from tests.verification import missed, quiet

ROWS = [[5, 6, 7, 8], [9, 10], [300, 4, 5]]


@pytest.fixture(scope="module", params=[("mini", "paper"), ("llama-mini", "shared")], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    size, architecture = request.param
    path = tmp_path_factory.mktemp("targets") / "checkpoint"
    random_checkpoint(path, size, targets=["all"], architecture=architecture)
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def path(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("targets") / "bundle"
    export_bundle(checkpoint, path)
    return path


def test_every_gate_in_every_mode(path: Path, checkpoint: Checkpoint) -> None:
    checks, record = verify_bundle(path, checkpoint, quiet, VerifyOptions(threads=1))
    assert record["verified"], [check for check in checks if not check.passed]
    found = {check.name: check for check in checks}
    for mode in ("static", "centroid", "request", "cohort", "tenant"):
        assert found[f"mode {mode}: update, relative difference"].value < 1e-3
    for fault in ("layers swapped", "scaling doubled", "A and B of another row"):
        assert found[f"caught: {fault}"].limit is not None, "the reference's logits did not move"


def test_one_graph_gives_all_factors(path: Path, checkpoint: Checkpoint) -> None:
    manifest = open_bundle(path).manifest
    outputs = [spec.name for spec in manifest.graphs["hypernetwork"].outputs]
    assert outputs == list(manifest.adaptation.factor_widths)
    assert [target.name for target in manifest.adaptation.targets] == list(checkpoint.config.targets)
    inputs = {spec.name for spec in manifest.graphs["decoder"].inputs}
    assert set(outputs) < inputs
    assert manifest.parameters.hypernetwork == sum(p.numel() for p in checkpoint.factors.parameters())


def test_factors_are_the_references(path: Path, checkpoint: Checkpoint) -> None:
    ours = chameleon_deploy.load(path, threads=1).adapt(ROWS, mode="request").factors
    for name, factor in inference.adapt(checkpoint, ROWS, "request").factors.items():
        expected = factor.swapaxes(1, 2) if name.endswith(".lora_B") else factor
        np.testing.assert_allclose(np.asarray(ours.sets.tensors[name]), expected.numpy(), atol=1e-6)


def change_factor_rows(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    """Rewrite the biases of the hypernetwork's last layers, by the name of their parameters."""

    def damage(path: Path) -> None:
        model = onnx.load(path / "hypernetwork.onnx", load_external_data=False)
        found = {}
        for tensor in model.graph.initializer:
            if tensor.name.endswith((".lora_A.bias", ".lora_B.bias")):
                info = external_data_helper.ExternalDataInfo(tensor)
                shape = tuple(tensor.dims)
                found[tensor.name] = np.memmap(path / info.location, np.float32, "r+", info.offset or 0, shape)
        for name, values in change({name: np.array(values) for name, values in found.items()}).items():
            found[name][:] = values
        reseal(path)

    return damage


def _scaling_dropped(biases: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: bias / 3 for name, bias in biases.items() if name.endswith(".lora_B.bias")}


def _neighbours_swapped(biases: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each tensor with that of the next one of its size."""
    changed = {}
    for name, bias in biases.items():
        alike = [other for other, values in biases.items() if values.shape == bias.shape]
        changed[name] = biases[alike[(alike.index(name) + 1) % len(alike)]]
    return changed


@pytest.mark.parametrize("fault", [_scaling_dropped, _neighbours_swapped])
def test_wrong_factors_are_caught(
    fault: Any, path: Path, checkpoint: Checkpoint, copy_of: Callable[[Path], Path]
) -> None:
    damaged = copy_of(path)
    change_factor_rows(fault)(damaged)
    names = missed(damaged, checkpoint)
    assert "factors, relative difference" in names
    assert "mode cohort: update, relative difference" in names


def test_a_decoder_that_ignores_a_layer_is_caught(
    path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of a runtime rather than of a bundle: one target's B never arrives."""
    from chameleon_deploy.runtime.backend import CpuBackend

    target = checkpoint.config.targets[0]
    place = CpuBackend.place

    def forgetful(self: CpuBackend, sets: Any) -> Any:
        zeroed = {n: np.asarray(a) * (n != f"{target}.lora_B") for n, a in sets.tensors.items()}
        return place(self, type(sets)(zeroed))

    monkeypatch.setattr(CpuBackend, "place", forgetful)
    assert "x1 factors: logits, max abs difference" in missed(path, checkpoint)


def test_the_swap_is_between_layers_of_one_size(path: Path) -> None:
    spec = open_bundle(path).manifest.adaptation
    stacks = {name: torch.full((1, 2, width), float(i)) for i, (name, width) in enumerate(spec.factor_widths.items())}
    swapped = wrong_factors.swapped_layers(spec, stacks)
    assert {name: stack.shape for name, stack in swapped.items()} == {n: stack.shape for n, stack in stacks.items()}
    moved = [name for name in stacks if not torch.equal(stacks[name], swapped[name])]
    assert len(moved) == len(stacks) - 2  # the head has no other layer of its size


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few texts, for what does not depend on how many there are."""
    file = tmp_path_factory.mktemp("text") / "texts.jsonl"
    texts = [text for kind in KINDS for text in python_texts(kind, 10)]
    file.write_text("".join(json.dumps({"text": text[:100]}) + "\n" for text in texts))
    return file


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_reduced_precisions(checkpoint: Checkpoint, tmp_path: Path, text: Path, precision: Any) -> None:
    """What does not depend on how good a precision is for weights of chance: factors, modes, promises, faults."""
    export_bundle(checkpoint, tmp_path / "bundle", precision=precision, calibration=[text])
    checks, _ = verify_bundle(tmp_path / "bundle", checkpoint, quiet, VerifyOptions([text], threads=1))
    found = {check.name: check for check in checks}
    for name in ("factors, relative difference", "mode cohort: factors, relative difference",
                 "alpha 0 against mode none",
                 "promise F: mode request, factors alone and in a batch", "caught: layers swapped",
                 "caught: scaling doubled", "caught: A and B of another row"):  # fmt: skip
        assert found[name].passed, found[name]
    assert not np.isnan([check.value for check in checks]).any()


def test_int8_needs_factors_to_measure_scales_with(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", "mini", targets=["mlp"], conditioning_size=8)
    with pytest.raises(InputError, match="measured with the factors of the centroids"):
        export_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "int8", precision="int8")
    assert not (tmp_path / "int8").exists()


def test_a_trained_lora_of_all_layers(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "lora", "llama-mini", "lora", targets=["attention", "mlp"])
    checkpoint = load_checkpoint(tmp_path / "lora")
    for parameter in checkpoint.factors.parameters():
        parameter.data *= 20  # as far from the base as a trained one
    export_bundle(checkpoint, tmp_path / "bundle")
    assert not missed(tmp_path / "bundle", checkpoint)
    lora = open_bundle(tmp_path / "bundle").lora()
    assert len(lora) == 2 * 2 * 7
    assert all(np.abs(stack).max() > 0 for stack in lora.values())
