"""Adapters in C++: every row of a mixed batch has the scores and tokens that Python gives it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import chameleon_deploy
from chameleon_deploy.contract.adapter_file import read_adapter, write_adapter
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from tests.adapters import GPT2_LAYERS, LLAMA_LAYERS, save_adapter
from tests.cpp.c_interface import BUILD, NativeError, NativeRuntime
from tests.cpp.parity import both
from tests.damage import edit, reseal
from tests.families import small_config
from tests.shared_data import adapter_case, read

TEXTS = ["The river runs to the sea.", "def main():", "A list of numbers", "one two three four"]
NAMES = ["all", "", "attention", "all"]


KINDS = [("mini", "fp32"), ("llama-mini", "fp32"), ("mini", "int8"), ("llama-mini", "int8")]
# Families with operators, and parts of a basis, that no other has.
FAMILIES = [("gemma2", "fp32"), ("phi3", "int8"), ("gpt_neox", "int8")]
LAYERS = {
    "mini": GPT2_LAYERS, "gemma2": LLAMA_LAYERS, "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
}  # fmt: skip


@pytest.fixture(scope="module", params=[*KINDS, *FAMILIES], ids=lambda kind: "-".join(kind))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with two adapters of different layers and ranks, and the file of a third."""
    directory = tmp_path_factory.mktemp("adapters")
    size, precision = request.param
    random_checkpoint(directory / "checkpoint", small_config(size) if (size, precision) in FAMILIES else size)
    base = directory / "checkpoint" / "base"
    layers = LAYERS.get(size, LLAMA_LAYERS)
    adapters = {
        "all": save_adapter(base, directory / "all", 1, r=4, lora_alpha=8, target_modules=layers),
        "attention": save_adapter(base, directory / "attention", 2, r=2, target_modules=layers[:1]),
    }
    own = load_adapted(str(base), adapters)
    manifest = export_bundle(own, directory / "bundle", precision=precision)
    third = {"third": save_adapter(base, directory / "third", 3, r=8, target_modules=layers[1:2])}
    factors = load_adapted(str(base), third, own.trunk).adapters["third"]
    write_adapter(directory / "third.safetensors", factors, manifest.adaptation)
    return directory


@pytest.fixture(scope="module")
def path(directory: Path) -> Path:
    return directory / "bundle"


def run(command: str, path: Path, options: Sequence[Any], adapters: Sequence[str]) -> subprocess.CompletedProcess[str]:
    named = [word for name in adapters for word in ("--adapter", name)]
    words = [BUILD / "chameleon-run", command, path, "--json", *options, *named]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


def test_rows_have_the_results_of_python(path: Path, tmp_path: Path) -> None:
    runtime = chameleon_deploy.load(path, threads=1)
    adapters = [name or None for name in NAMES]
    prompts = [word for text in TEXTS for word in ("--prompt", text)]
    generated = run("generate", path, [*prompts, "--max-new-tokens", 8], NAMES)
    assert generated.returncode == 0, generated.stderr
    found = [json.loads(line)["token_ids"] for line in generated.stdout.splitlines()]
    expected = runtime.generate(TEXTS, adapters=adapters, max_new_tokens=8)
    assert found == [generation.token_ids for generation in expected]
    assert found != [generation.token_ids for generation in runtime.generate(TEXTS, max_new_tokens=8)]
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    scored = run("score", path, ["--text", file, "--batch-size", 3], NAMES)
    assert scored.returncode == 0, scored.stderr
    for line, score in zip(scored.stdout.splitlines(), runtime.score(TEXTS, adapters=adapters), strict=True):
        np.testing.assert_allclose(json.loads(line)["token_logprobs"], score.token_logprobs, atol=2e-5)


def test_the_program_loads_adapters(directory: Path, path: Path) -> None:
    runtime = chameleon_deploy.load(path, threads=1)
    runtime.load_adapter("third", directory / "third.safetensors")
    (expected,) = runtime.generate(TEXTS[:1], adapters=["third"], max_new_tokens=8)
    options = ["--prompt", TEXTS[0], "--max-new-tokens", 8]
    for source in ("third.safetensors", "third"):
        generated = run("generate", path, [*options, "--load-adapter", f"third={directory / source}"], ["third"])
        assert generated.returncode == 0, generated.stderr
        assert json.loads(generated.stdout)["token_ids"] == expected.token_ids
    for wrong in ("third", f"all={directory / 'third'}"):
        assert run("generate", path, [*options, "--load-adapter", wrong], ["third"]).returncode == 2


@pytest.mark.parametrize("size", ["mini", "llama-mini"])
def test_a_base_without_adapters(size: str, tmp_path: Path) -> None:
    """A plain base in fp32; in int8 one that is told which layers a file may update, and how far."""
    random_checkpoint(tmp_path / "checkpoint", size)
    base = tmp_path / "checkpoint" / "base"
    export_bundle(load_adapted(str(base), {}), tmp_path / "plain")
    layers = (GPT2_LAYERS if size == "mini" else LLAMA_LAYERS)[:2]
    later = load_adapted(str(base), {}, adaptable=layers, max_rank=4)
    export_bundle(later, tmp_path / "empty", precision="int8")
    spec = chameleon_deploy.load(tmp_path / "empty").manifest.adaptation
    for name, rank in (("late", 4), ("wide", 5)):
        shapes = {factor: (rank, width) for factor, width in spec.factor_widths.items()}
        random = np.random.default_rng(0)
        factors = {factor: random.normal(0, 0.1, shape).astype(np.float32) for factor, shape in shapes.items()}
        write_adapter(tmp_path / f"{name}.safetensors", factors, spec)
    for bundle in ("plain", "empty"):
        python, native = both(tmp_path / bundle)
        assert native.generate(TEXTS, max_new_tokens=8) == python.generate(TEXTS, max_new_tokens=8)
        for file, code in (("late", None if bundle == "empty" else "adapter_invalid"),
                           ("wide", "tensor_invalid" if bundle == "empty" else "adapter_invalid")):  # fmt: skip
            for runtime in (python, native):
                try:
                    runtime.load_adapter(file, tmp_path / f"{file}.safetensors")
                    found = None
                except (chameleon_deploy.ChameleonError, NativeError) as error:
                    found = error.code
                assert found == code, (bundle, file)
        if bundle == "empty":
            names = ["late", None, None, "late"]
            rows = [runtime.generate(TEXTS, adapters=names, max_new_tokens=8) for runtime in (python, native)]
            assert rows[0] == rows[1] != python.generate(TEXTS, max_new_tokens=8)
        native.close()


@pytest.mark.parametrize(("size", "architecture"), [("mini", "shared"), ("llama-mini", "paper")])
def test_generated_factors_of_all_layers(size: str, architecture: Any, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", size, targets=["all"], architecture=architecture)
    export_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    runtime = chameleon_deploy.load(tmp_path / "bundle", threads=1)
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    prompts = [word for text in TEXTS for word in ("--prompt", text)]
    for mode in ("cohort", "request", "centroid", "none"):
        scored = run("score", tmp_path / "bundle", ["--text", file, "--mode", mode], [])
        assert scored.returncode == 0, scored.stderr
        for line, score in zip(scored.stdout.splitlines(), runtime.score(TEXTS, mode=mode), strict=True):
            np.testing.assert_allclose(json.loads(line)["token_logprobs"], score.token_logprobs, atol=2e-5)
        generated = run("generate", tmp_path / "bundle", [*prompts, "--mode", mode, "--max-new-tokens", 8], [])
        found = [json.loads(line)["token_ids"] for line in generated.stdout.splitlines()]
        assert found == [row.token_ids for row in runtime.generate(TEXTS, mode=mode, max_new_tokens=8)]


def test_generated_factors_enter_the_basis_of_int8(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", "mini", targets=["all"])
    export_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", precision="int8")
    python, native = both(tmp_path / "bundle")
    expected, found = (runtime.adapt(TEXTS, mode="request") for runtime in (python, native))
    for name, tensor in expected.factors.sets.tensors.items():
        np.testing.assert_allclose(np.asarray(found.factors.sets.tensors[name]), np.asarray(tensor), atol=1e-6)
    native.close()


def test_factors_and_tokens_of_a_file_are_those_of_python(directory: Path) -> None:
    python, native = both(directory / "bundle")
    for runtime in (python, native):
        runtime.load_adapter("third", directory / "third.safetensors")
    names: list[Any] = ["third", None, "all", "third"]
    blends: list[Any] = [{"attention": 0.75, "third": -1.5}, "all", {"third": 0.5}, {"third": -1.5, "attention": 0.75}]
    for adapters, ids in ((names, [0, 1, 2, 0]), (blends, [0, 1, 2, 0])):
        expected, found = (runtime.adapt(TEXTS, adapters=adapters) for runtime in (python, native))
        assert found.factors.factor_ids.tolist() == expected.factors.factor_ids.tolist() == ids
        for name, tensor in expected.factors.sets.tensors.items():
            assert np.asarray(found.factors.sets.tensors[name]).tobytes() == np.asarray(tensor).tobytes(), name
    generations = [runtime.generate(TEXTS, adapters=names, max_new_tokens=8) for runtime in (python, native)]
    assert generations[0] == generations[1] != python.generate(TEXTS, max_new_tokens=8)
    factors = read_adapter(directory / "third.safetensors", python.manifest.adaptation).factors
    caller = [runtime.generate(TEXTS, mode="static", factors=factors, max_new_tokens=8) for runtime in (python, native)]
    assert caller[0] == caller[1]
    assert caller[0][0].token_ids == generations[0][0].token_ids
    native.unload_adapter("third")
    for wrong in (lambda: native.unload_adapter("third"), lambda: native.generate(TEXTS, adapters=names)):
        with pytest.raises(NativeError) as caught:
            wrong()
        assert caught.value.code == "adapter_invalid"
    native.close()


def test_the_list_and_a_replacement_are_those_of_python(directory: Path) -> None:
    """And what a replacement leaves: a text that is adapted later has the factors of the new file."""
    python, native = both(directory / "bundle")

    def listed() -> dict[str, Any]:
        adapters = [(python.adapters[name], name) for name in python.adapters.names]
        expected = {
            name: (each.rank, each.targets, each.size, each.digest, python.adapters.uses(each))
            for each, name in adapters
        }
        found = native.list_adapters()
        assert list(found.items()) == list(expected.items())
        return found

    assert [(info[0], info[3], info[4]) for info in listed().values()] == [(4, None, 0), (2, None, 0)]
    other = read_adapter(directory / "third.safetensors", python.manifest.adaptation).factors
    doubled = directory / "doubled.safetensors"
    factors = {name: matrix * (2 if name.endswith("lora_B") else 1) for name, matrix in other.items()}
    write_adapter(doubled, factors, python.manifest.adaptation)
    for runtime in (python, native):
        runtime.load_adapter("third", directory / "third.safetensors")
        runtime.load_adapter("last", doubled)
        runtime.score(TEXTS, adapters=["third", {"third": 0.5, "last": 1.0}, None, "all"])
        with pytest.raises((chameleon_deploy.ChameleonError, NativeError)):
            runtime.score(TEXTS[:1], adapters=[{"third": 1.0, "unknown": 1.0}])  # which counts for none
    before = listed()
    assert {name: info[4] for name, info in before.items()} == {"all": 1, "attention": 0, "third": 2, "last": 1}
    for name, code in (("all", "adapter_invalid"), ("a/b", "input_invalid")):
        for runtime in (python, native):
            with pytest.raises((chameleon_deploy.ChameleonError, NativeError)) as caught:
                runtime.load_adapter(name, doubled, replace=True)
            assert caught.value.code == code  # type: ignore[attr-defined]
    for runtime in (python, native):
        runtime.load_adapter("third", doubled, replace=True)
        runtime.load_adapter("new", doubled, replace=True)  # replaces nothing
    after = listed()
    assert list(after) == ["all", "attention", "third", "last", "new"]
    assert after["third"][3] == before["last"][3] != before["third"][3]
    assert after["third"][4] == 0
    assert {name: after[name] for name in before if name != "third"} == {n: before[n] for n in before if n != "third"}
    expected, found = (runtime.adapt(TEXTS[:1], adapters=["third"]) for runtime in (python, native))
    for name, tensor in expected.factors.sets.tensors.items():
        assert np.asarray(found.factors.sets.tensors[name]).tobytes() == np.asarray(tensor).tobytes(), name
    native.close()


def test_an_activated_adapter_is_that_of_python(directory: Path, tmp_path: Path) -> None:
    """From a file, activated by tokens in the middle of one text that another has not, in a mixed batch."""
    python, native = both(directory / "bundle")
    spec, first = python.manifest.adaptation, python.encode(TEXTS)[0]
    random = np.random.default_rng(4)
    factors = {n: random.normal(0, 0.3, (2, width)).astype(np.float32) for n, width in spec.factor_widths.items()}
    write_adapter(tmp_path / "late.safetensors", factors, spec, first[len(first) // 2 : len(first) // 2 + 2])
    for runtime in (python, native):
        runtime.load_adapter("late", tmp_path / "late.safetensors")
    texts, names = [*TEXTS, TEXTS[0] + TEXTS[0]], ["late", "late", "all", None, "late"]
    expected, found = (runtime.generate(texts, adapters=names, max_new_tokens=6) for runtime in (python, native))
    assert found == expected
    scores, theirs = (
        [row.token_logprobs for row in runtime.score(texts, adapters=names)] for runtime in (python, native)
    )
    plain = [row.token_logprobs for row in python.score(texts, mode="none")]
    for ours, other in zip(scores, theirs, strict=True):
        np.testing.assert_allclose(other, ours, atol=2e-5)
    np.testing.assert_allclose(scores[0][: len(first) // 2], plain[0][: len(first) // 2], atol=1e-5)
    assert scores[1] == pytest.approx(plain[1], abs=1e-5)  # nothing activates it
    assert np.abs(np.subtract(scores[0], plain[0])).max() > 1e-3
    with pytest.raises(NativeError) as caught:
        native.generate(TEXTS[:1], adapters=[{"late": 0.5, "all": 0.5}])
    assert caught.value.code == "adapter_invalid"
    native.close()


def test_a_rank_beyond_the_limit_is_refused(directory: Path, tmp_path: Path) -> None:
    python, native = both(directory / "bundle")
    spec = python.manifest.adaptation
    for rank, code in ((1024, None), (1025, "tensor_invalid")):
        factors = {name: np.zeros((rank, width), np.float32) for name, width in spec.factor_widths.items()}
        write_adapter(tmp_path / "large.safetensors", factors, spec)
        for runtime in (python, native):
            try:
                runtime.load_adapter("large", tmp_path / "large.safetensors")
                runtime.unload_adapter("large")
                found = None
            except (chameleon_deploy.ChameleonError, NativeError) as error:
                found = error.code
            assert found == code
    native.close()


@pytest.mark.parametrize(
    ("adapters", "code"),
    [
        (["nobody"], "adapter_invalid"), (["all", "all"], "input_invalid"), (["all=1,nobody=1"], "adapter_invalid"),
        (["all="], "input_invalid"), (["all=1,all=2"], "input_invalid"), (["all=1x"], "input_invalid"),
        (["all=inf"], "input_invalid"), (["all=1,"], "input_invalid"), (["all=3.4e38"], "not_finite"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(adapters: list[str], code: str, path: Path) -> None:
    result = run("generate", path, ["--prompt", "a", "--prompt", "b", "--prompt", "c"], adapters)
    assert (result.returncode, f"[{code}]" in result.stderr) == (2, True)
    static = run("generate", path, ["--prompt", "a", "--mode", "static"], [])
    assert "[mode_unavailable]" in static.stderr


@pytest.mark.parametrize("directory", KINDS[:1], indirect=True, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"adaptation__adapters": ["all", "all"]},
        {"adaptation__adapters": ["none", "attention"]},
        {"adaptation__adapters": ["a/b", "attention"]},
        {"adaptation__adapters": []},
        {"adaptation__base_digest": ""},
        {"precision": "int8"},  # without a basis
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, Any], path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "bundle")
    edit(**changes)(tmp_path / "bundle")
    result = run("generate", tmp_path / "bundle", ["--prompt", "a"], [])
    assert "[manifest_invalid]" in result.stderr
    with pytest.raises(chameleon_deploy.ChameleonError) as caught:
        chameleon_deploy.load(tmp_path / "bundle", threads=1)
    assert caught.value.code == "manifest_invalid"


LAYER = "transformer.h.0.attn.c_attn"
BASIS_FAULTS: dict[str, Any] = {
    "a missing tensor": lambda basis: basis.pop(f"{LAYER}.in_after"),
    "another tensor": lambda basis: basis.update(extra=np.zeros(3, np.float32)),
    "another length": lambda basis: basis.update({f"{LAYER}.in_after": np.zeros(3, np.float32)}),
    "NaN": lambda basis: basis[f"{LAYER}.out_after"].fill(np.nan),
    "float64": lambda basis: basis.update({f"{LAYER}.in_before": np.ones(64)}),
    "another block": lambda basis: basis.update({f"{LAYER}.in_block": np.array([2])}),
    "no block": lambda basis: basis.update({f"{LAYER}.out_blocks": np.array([], np.int64)}),
    "five blocks": lambda basis: basis.update({f"{LAYER}.out_blocks": np.ones(5, np.int64)}),
    "a block that does not divide": lambda basis: basis.update({f"{LAYER}.out_blocks": np.array([64, 64])}),
    "blocks of another type": lambda basis: basis.update({f"{LAYER}.in_block": np.array([4], np.int32)}),
}


@pytest.mark.parametrize("directory", KINDS[2:3], indirect=True, ids=str)
@pytest.mark.parametrize("fault", BASIS_FAULTS)
def test_a_damaged_basis_is_refused(fault: str, path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "bundle")
    basis = load_file(path / "basis.safetensors")
    BASIS_FAULTS[fault](basis)
    save_file(basis, tmp_path / "bundle" / "basis.safetensors")
    reseal(tmp_path / "bundle")
    for load in (chameleon_deploy.load, NativeRuntime):
        with pytest.raises((chameleon_deploy.ChameleonError, NativeError)) as caught:
            load(tmp_path / "bundle")
        assert caught.value.code == "tensor_invalid"  # type: ignore[attr-defined]


def test_a_row_that_fails_ends_alone(tmp_path: Path) -> None:
    (case,) = (case for case in read("adapters.json") if case["name"] == "its_logits_overflow")
    bundle, file = adapter_case(case, tmp_path)
    python, native = both(bundle)
    prompts = [[5, 9, 301], [17, 44], [7]]
    found = []
    for runtime in (python, native):
        runtime.load_adapter("legal", file)
        with pytest.raises((chameleon_deploy.ChameleonError, NativeError)) as caught:
            runtime.generate(prompts, adapters=[None, "legal", "own"])
        assert caught.value.code == "not_finite"  # type: ignore[attr-defined]
        rows = runtime.generate(prompts, adapters=[None, "legal", "own"], errors="row")
        found.append([(row.token_ids, row.text, row.finish_reason, row.error and row.error.code) for row in rows])
    native.close()
    assert found[0] == found[1]
    assert [reason for _, _, reason, _ in found[0]] == ["length", "error", "length"]
    assert found[0][1][3] == "not_finite"
