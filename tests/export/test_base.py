"""A base model without adapters is a bundle, which takes adapters later if it was told which layers they update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Adapt, Engine, Generate
from chameleon_deploy.contract.adapter_file import StoredAdapter, read_adapter, write_adapter
from chameleon_deploy.contract.bundle import AdaptationSpec, Precision, open_bundle
from chameleon_deploy.errors import AdapterError, CheckFailedError, CheckpointError, InputError, ModeError, TensorError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import AdaptedBase, load_adapted
from chameleon_deploy.reference.description import adaptation_spec
from chameleon_deploy.reference.source import load_source
from chameleon_deploy.verify import adapter_checks
from chameleon_deploy.verify.gates import require_passed
from chameleon_deploy.verify.run import VerifyOptions, verify_bundle
from tests.adapters import save_adapter
from tests.commands import call

TEXTS = ["The river runs to the sea.", "def main():", "A list"]
NAMES = ["late", None, "late"]
LAYERS = ["q_proj", "down_proj"]


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def base(llama_path: Path) -> Path:
    return llama_path / "base"


@pytest.fixture(scope="module")
def peft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("peft") / "late", 1, r=4, target_modules=LAYERS)


def exported(base: Path, out: Path, precision: Precision = "fp32", **options: Any) -> Path:
    export_bundle(load_adapted(str(base), {}, **options), out, precision=precision)
    return out


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_adapters_that_are_loaded_later_are_those_of_an_export_with_them(
    precision: Precision, base: Path, peft: Path, tmp_path: Path
) -> None:
    with_it = load_adapted(str(base), {"late": peft})
    export_bundle(with_it, tmp_path / "with", precision=precision)
    expected = chameleon_deploy.load(tmp_path / "with", threads=1)
    path = exported(base, tmp_path / "empty", precision, adaptable=LAYERS, max_rank=8)
    runtime = chameleon_deploy.load(path, threads=1)
    spec = runtime.manifest.adaptation
    assert (spec.regime, spec.rank, spec.adapters, spec.modes) == ("base", 8, (), ("none", "static"))
    assert [target.name for target in spec.targets] == [t.name for t in expected.manifest.adaptation.targets]
    assert not (path / "lora.safetensors").exists()
    with pytest.raises(AdapterError, match="loaded are none"):
        runtime.generate(TEXTS, adapters=NAMES)
    with pytest.raises(ModeError, match="no trained LoRA"):
        runtime.generate(TEXTS, mode="static")
    alone = [generation.token_ids for generation in runtime.generate(TEXTS, max_new_tokens=8)]
    with Engine(runtime, rows=4) as engine:
        first = engine.submit(TEXTS, Generate(max_new_tokens=8)).result()
        write_adapter(tmp_path / "late.safetensors", with_it.adapters["late"], spec)
        runtime.load_adapter("late", tmp_path / "late.safetensors")
        second = engine.submit(TEXTS, Generate(max_new_tokens=8), Adapt(adapters=NAMES)).result()
    assert [row.token_ids for row in first] == alone
    assert [row.token_ids for row in second] == [
        row.token_ids for row in runtime.generate(TEXTS, adapters=NAMES, max_new_tokens=8)
    ]
    # In int8 the export with the adapter has seen its activations, and its scales are others.
    for found, wanted in zip(runtime.score(TEXTS, adapters=NAMES), expected.score(TEXTS, adapters=NAMES), strict=True):
        np.testing.assert_allclose(
            found.token_logprobs, wanted.token_logprobs, atol=5e-5 if precision == "fp32" else 0.1
        )
    plain = runtime.score(TEXTS, mode="none")
    assert np.abs(
        np.subtract(plain[0].token_logprobs, runtime.score(TEXTS, adapters=NAMES)[0].token_logprobs)
    ).max() > (0.2)


def test_a_plain_base_has_no_input_for_factors(base: Path, peft: Path, tmp_path: Path) -> None:
    bundle = open_bundle(exported(base, tmp_path / "plain"))
    spec = bundle.manifest.adaptation
    assert (spec.regime, spec.targets, spec.rank, spec.modes) == ("base", (), 0, ("none",))
    for graph in bundle.manifest.graphs.values():
        assert not [tensor.name for tensor in graph.inputs if "lora" in tensor.name or tensor.name == "column_ids"]
    runtime = chameleon_deploy.load(tmp_path / "plain", threads=1)
    with pytest.raises(ModeError, match="choose one of none"):
        runtime.generate(TEXTS, mode="static")
    factors = load_adapted(str(base), {"late": peft})
    write_adapter(tmp_path / "late.safetensors", factors.adapters["late"], spec)
    with pytest.raises(AdapterError):
        runtime.load_adapter("late", tmp_path / "late.safetensors")


def test_what_was_not_promised_is_refused(base: Path, tmp_path: Path) -> None:
    runtime = chameleon_deploy.load(exported(base, tmp_path / "b", adaptable=["q_proj"], max_rank=4), threads=1)
    spec = runtime.manifest.adaptation
    wider = {name: np.zeros((5, width), np.float32) for name, width in spec.factor_widths.items()}
    write_adapter(tmp_path / "wide.safetensors", wider, spec)
    with pytest.raises(TensorError, match="--max-rank 4"):
        runtime.load_adapter("wide", tmp_path / "wide.safetensors")
    other = load_adapted(str(base), {}, adaptable=["all"])
    layer = {"lm_head.lora_A": np.zeros((1, 64), np.float32), "lm_head.lora_B": np.zeros((1, 320), np.float32)}
    write_adapter(tmp_path / "head.safetensors", layer, adaptation_spec(other))
    with pytest.raises(AdapterError, match="--adaptable LAYERS"):
        runtime.load_adapter("head", tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="no linear layer is named 'nope'"):
        load_adapted(str(base), {}, adaptable=["nope"])


def test_verification_loads_random_adapters(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_source(base, None, {}, ["attention", "lm_head"], 4)
    assert isinstance(source, AdaptedBase)
    path = exported(base, tmp_path / "b", adaptable=["attention", "lm_head"], max_rank=4)
    checks, record = verify_bundle(path, load_source(base, None, {}), silent, VerifyOptions(threads=1))
    assert record["verified"], [check for check in checks if not check.passed]
    names = {check.name for check in checks}
    assert {f"caught: {fault}" for fault in adapter_checks.MUTATIONS} <= names
    assert {f"adapter random-{kind}: KL, mean" for kind in ("all", "some", "activated")} <= names
    # The fault: what a file of an adapter holds is read and does not reach the decoder.
    from chameleon_deploy.runtime import adapters

    def zeros(file: Path, spec: AdaptationSpec) -> StoredAdapter:
        stored = read_adapter(file, spec)
        factors = {name: np.zeros((1, width), np.float32) for name, width in spec.factor_widths.items()}
        return stored._replace(factors=factors)

    monkeypatch.setattr(adapters, "read_adapter", zeros)
    wrong, _ = verify_bundle(path, source, silent, VerifyOptions(threads=1))
    missed = {check.name for check in wrong if not check.passed}
    assert {"mixed adapters: logits, max abs difference", "adapter random-all: update, relative difference"} <= missed


def test_a_plain_base_is_verified(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_adapted(str(base), {})
    path = exported(base, tmp_path / "b")
    checks, record = verify_bundle(path, source, silent, VerifyOptions(threads=1))
    assert record["verified"]
    assert "base model: KL, mean" in {check.name for check in checks}
    source.trunk.causal_lm.get_submodule("model.layers.0.mlp.down_proj").weight.data *= 1.01
    wrong, _ = verify_bundle(path, source, silent, VerifyOptions(threads=1))
    with pytest.raises(CheckFailedError, match="base model: logits"):
        require_passed(wrong)


def test_commands(base: Path, peft: Path, mini_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    made = call("chameleon_deploy.export", base, "--out", out, "--adaptable", "attention", "--adaptable", "down_proj",
               "--max-rank", 4, "--no-verify")  # fmt: skip
    assert (made.returncode, "regime base" in made.stdout) == (0, True), made.stderr
    file = tmp_path / "late.safetensors"
    written = call("chameleon_deploy.adapter", out, "--peft", peft, "--out", file)
    assert written.returncode == 0, written.stderr
    chameleon_deploy.load(out, threads=1).load_adapter("late", file)
    for arguments, message in (
        ((base, "--max-rank", 4), "--adaptable"),
        ((mini_path, "--adaptable", "all"), "base model"),
        ((tmp_path,), "no base model"),
        ((tmp_path / "none",), "does not exist"),
    ):
        refused = call("chameleon_deploy.export", *arguments, "--out", tmp_path / "c")
        assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_a_base_goes_with_a_checkpoint(base: Path) -> None:
    with pytest.raises(InputError, match="--base goes with"):
        load_source(base, "gpt2", {})
    with pytest.raises(CheckpointError, match="does not exist"):
        load_source(Path("/no/such/model"), None, {})
