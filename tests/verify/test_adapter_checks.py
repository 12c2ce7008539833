"""`verify` passes a right bundle with adapters and catches wrong ones, whose faults are planted in its own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import AdaptationSpec
from chameleon_deploy.errors import InputError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import AdaptedBase, AdapterLogits, load_adapted
from chameleon_deploy.verify import adapter_checks, logit_checks, wrong_factors
from chameleon_deploy.verify.gates import GATES, Check
from chameleon_deploy.verify.run import VerifyOptions, verify_bundle
from tests.adapters import LLAMA_LAYERS, save_adapter
from tests.damage import reseal
from tests.rows import random_rows
from tests.verification import missed


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
    export_bundle(adapted, out)
    return out


def test_a_right_bundle_passes_every_check(path: Path, adapted: AdaptedBase) -> None:
    checks, record = verify_bundle(path, adapted, silent, VerifyOptions(threads=1))
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
    "fault", [adapter_checks.another_adapter, wrong_factors.swapped_layers, _undo_scaling, _one_layer_of_zeros]
)
def test_wrong_factors_in_the_bundle_are_caught(
    fault: Callable[[AdaptationSpec, Any], Any], path: Path, adapted: AdaptedBase, copy_of: Callable[[Path], Path]
) -> None:
    from chameleon_deploy.contract.bundle import open_bundle

    damaged = copy_of(path)
    stacks = load_file(damaged / "lora.safetensors")
    spec = open_bundle(path).manifest.adaptation
    save_file({n: np.ascontiguousarray(a) for n, a in fault(spec, stacks).items()}, damaged / "lora.safetensors")
    reseal(damaged)
    found = missed(damaged, adapted)
    assert "mixed adapters: logits, max abs difference" in found  # by what the model computes, not only by its files
    assert "adapter legal: factors, max abs difference" in found


def test_a_decoder_that_drops_an_update_is_caught(
    path: Path, adapted: AdaptedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime binds zeros for one layer: the files are right, the rows are not."""
    from chameleon_deploy.runtime import factor_sources
    from chameleon_deploy.runtime.factors import stack_sets

    def without_a_layer(stacks: Any) -> Any:
        sets = stack_sets(stacks)
        dropped = {n: np.zeros_like(a) if "layers.0.self_attn.q_proj" in n else a for n, a in sets.tensors.items()}
        return type(sets)(dropped)

    monkeypatch.setattr(factor_sources, "stack_sets", without_a_layer)
    names = {"mixed adapters: logits, max abs difference", "adapter code: update, relative difference"}
    assert names <= missed(path, adapted)


def test_the_adapters_must_be_the_bundles(path: Path, adapted: AdaptedBase, mini_path: Path) -> None:
    one = AdaptedBase(adapted.name, adapted.trunk, {"legal": adapted.adapters["legal"]}, adapted.base_digest, "")
    with pytest.raises(InputError, match="legal, code"):
        verify_bundle(path, one, silent, VerifyOptions(threads=1))
    other = AdaptedBase("gpt2", adapted.trunk, adapted.adapters, "0" * 64, "")
    with pytest.raises(InputError, match="base model"):
        verify_bundle(path, other, silent, VerifyOptions(threads=1))


ROWS = random_rows(7, 8, 9)
FP32, SIZE = GATES["fp32"], 0.5  # of a planted fault


@pytest.fixture(scope="module")
def runtime(path: Path) -> Runtime:
    return chameleon_deploy.load(path, threads=1)


def test_each_step_has_its_rows_and_its_adapters(
    runtime: Runtime, adapted: AdaptedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, list[Any]] = {}

    def note(name: str, *given: Any, **named: Any) -> list[Check]:
        called.setdefault(name, []).append((*given[1:], *named.values()))
        return []

    for name in list(vars(adapter_checks)):
        if name.startswith(("check_", "gate_", "cache_")) and name != "gate_of":
            monkeypatch.setattr(adapter_checks, name, partial(note, name))
    rows = [[1] * (1 + row * 13 % 41) for row in range(41)]  # 32 ragged ones, 8 typical ones, and the last

    def steps(whole: bool, max_kl: float | None = None) -> set[str]:
        called.clear()
        assert adapter_checks.verify_adapters(runtime, AdapterLogits(adapted), rows, whole, silent, max_kl) == []
        return set(called)

    names = ["legal", "code", None] * 14
    everything = steps(whole=True)
    few, batch, typical = rows[:8], [*rows[:32], rows[-1]], rows[32:36]
    _, _, checked, _, of_rows, gate = called["gate_checks"][0]
    assert (checked, of_rows, gate) == (rows, names[:41], FP32)
    _, checked, factors, of_rows, _ = called["cache_checks"][0]
    of_length = {len(ids): name for ids, name in zip(rows, names[:41], strict=True)}
    assert list(map(len, checked)) == list(range(34, 42))
    assert (list(of_rows), len(factors.factor_ids)) == ([of_length[length] for length in range(34, 42)], 8)
    assert called["check_batching"] == [(batch, FP32, names[:33])]
    assert called["check_scores"] == [(few, FP32, names[:8])]
    assert called["check_rerun"] == called["check_alone"] == [(few, names[:8])]
    assert called["check_neighbours"] == [(few, ["legal"])]
    assert called["check_none"][0][1:] == (typical, FP32)
    assert [given[1:] for given in called["check_adapter"]] == [(typical, FP32, name) for name in ("legal", "code")]
    assert called["check_wrong_factors"][0][1:] == (few, names[:8])
    coarse = msgspec.structs.replace(runtime.manifest, precision="bf16")
    monkeypatch.setattr(runtime, "manifest", coarse)
    assert everything - steps(whole=False, max_kl=1e-3) == {
        "check_data",
        "check_known_answers",
        "check_factors",
        "check_alone",
    }
    gate = called["check_scores"][0][1]
    assert gate.kl_mean == 1e-3
    assert gate.summation_order_tolerance == GATES["bf16"].rounding_tolerance


def test_figures_of_one_adapter(runtime: Runtime, adapted: AdaptedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, rows = AdapterLogits(adapted), ROWS[:4]
    limits = {
        "logits, max abs difference": FP32.max_abs_logit, "KL, mean": FP32.kl_mean,
        "KL, 99.9th percentile": FP32.kl_p999, "update, relative difference": 0.05,
    }  # fmt: skip

    def checks(name: str) -> dict[str, Check]:
        found = adapter_checks.check_adapter(runtime, reference, rows, FP32, name)
        return {check.name.removeprefix(f"adapter {name}: "): check for check in found}

    for name in ("legal", "code"):
        assert all(check.passed for check in checks(name).values())
        assert {what: check.limit for what, check in checks(name).items()} == limits
    adapt = runtime.adapt

    def stronger(texts: Any, **arguments: Any) -> Any:
        found = adapt(texts, **arguments)
        return replace(found, factors=logit_checks.with_B(found.factors, lambda B: B * 1.5))

    monkeypatch.setattr(runtime, "adapt", stronger)
    update = checks("code")["update, relative difference"]
    assert update.value > 0.3  # several layers at half as much again
    monkeypatch.setattr(adapter_checks, "update_difference", lambda *_: None)
    update = checks("code")["update, relative difference"]
    assert (update.value, update.limit, update.note) == (0, None, "not checked: it changes no logit")


def test_figures_of_the_base_model(runtime: Runtime, adapted: AdaptedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def checks() -> list[Check]:
        return list(adapter_checks.check_none(runtime, AdapterLogits(adapted), ROWS, FP32))

    assert [check.limit for check in checks()] == [FP32.max_abs_logit, FP32.kl_mean, FP32.kl_p999]
    assert all(check.passed for check in checks())
    adapt = runtime.adapt
    monkeypatch.setattr(runtime, "adapt", lambda rows, **_: adapt(rows, adapters=["code"] * len(rows)))
    assert not any(check.passed for check in checks())


def test_figures_of_factors(runtime: Runtime, adapted: AdaptedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    def figures() -> list[tuple[str, float, float | None]]:
        return [(check.name, check.value, check.limit) for check in adapter_checks.check_factors(runtime, adapted)]

    legal, code = (f"adapter {name}: factors, max abs difference" for name in ("legal", "code"))
    assert figures() == [(legal, 0, 1e-6), (code, 0, 1e-6)]
    wrong = {name: stack.copy() for name, stack in runtime.bundle.lora().items()}
    next(iter(wrong.values()))[1, 0, 0] += SIZE
    monkeypatch.setattr(type(runtime.bundle), "lora", lambda bundle: wrong)
    assert figures() == [(legal, 0, 1e-6), (code, pytest.approx(SIZE), 1e-6)]


def test_figures_of_factors_alone(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["legal", "code", None, "code"]

    def check() -> Check:
        (found,) = adapter_checks.check_alone(runtime, ROWS[:4], names)
        return found

    assert (check().value, check().limit) == (0, 0)
    adapt = runtime.adapt

    def shifted(rows: Any, **arguments: Any) -> Any:
        found = adapt(rows, **arguments)
        shift = SIZE * (len(rows) > 1)
        return replace(found, factors=logit_checks.with_B(found.factors, lambda B: B + shift))

    monkeypatch.setattr(runtime, "adapt", shifted)
    assert check().value == pytest.approx(SIZE)


def test_wrong_factors_move_a_right_bundle_as_far(
    runtime: Runtime, adapted: AdaptedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def little(spec: AdaptationSpec, stacks: Any) -> Any:
        return {name: stack * 1.01 for name, stack in stacks.items()}

    def nothing(spec: AdaptationSpec, stacks: Any) -> Any:
        return stacks

    monkeypatch.setattr(adapter_checks, "MUTATIONS", {**adapter_checks.MUTATIONS, "little": little, "nothing": nothing})
    names = adapter_checks.in_turn(list(adapted.adapters), 4)
    *checks, last = adapter_checks.check_wrong_factors(runtime, AdapterLogits(adapted), ROWS[:4], names)
    assert [check.name for check in checks] == [
        f"caught: {fault}" for fault in ("another adapter", "layers swapped", "scaling doubled", "little")
    ]
    for check in checks:
        assert (check.limit, check.at_least) == (0.5, True)
        assert check.value == pytest.approx(1, rel=1e-2)
    note = "not checked: it changes no logit of the reference"
    assert last == Check("caught: nothing", 0, None, note=note)  # although the adapters' ranks differ


def test_another_adapter_is_the_next_one() -> None:
    spec: Any = None
    found = adapter_checks.another_adapter(spec, {"t.lora_B": np.arange(6).reshape(3, 2)})
    assert found["t.lora_B"].tolist() == [[2, 3], [4, 5], [0, 1]]
