"""PEFT directories in C++: the factors and tokens that Python reads from them, and its refusals in its words."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import chameleon_deploy
from chameleon_deploy.contract.peft_lora import CONFIG_FILE, TENSOR_FILE
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.random import random_checkpoint
from tests.adapters import GPT2_LAYERS, LLAMA_LAYERS, save_adapter
from tests.cpp.c_interface import NativeError, NativeRuntime
from tests.cpp.parity import both
from tests.damaged_adapters import DAMAGES, config
from tests.families import small_config
from tests.shared_data import good_bundle

TEXTS = ["The river runs to the sea.", "def main():", "one two three four"]
PHI3_LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]  # queries, keys and values are one layer


class Given(NamedTuple):
    """A base model, a bundle that takes adapters of rank 8 of all its layers, and it in both languages."""

    base: Path
    layers: list[str]
    bundle: Path
    python: chameleon_deploy.Runtime
    native: NativeRuntime

    def save(self, out: Path, **options: Any) -> Path:
        defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": self.layers}
        return save_adapter(self.base, out, **defaults | options)

    def difference(self, name: str) -> str | None:
        """Return the first factor whose bits differ between the languages, or None."""
        ours, theirs = (r.adapt(TEXTS[:1], adapters=[name]).factors.sets.tensors for r in (self.python, self.native))
        assert ours.keys() == theirs.keys()
        differing = (n for n in ours if np.asarray(ours[n]).tobytes() != np.asarray(theirs[n]).tobytes())
        return next(differing, None)


KINDS = [("mini", "fp32"), ("llama-mini", "fp32"), ("phi3", "fp32"), ("llama-mini", "int8")]
LAYERS = {"mini": GPT2_LAYERS, "phi3": PHI3_LAYERS}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Given]:
    directory = tmp_path_factory.mktemp("peft")
    size, precision = request.param
    random_checkpoint(directory / "checkpoint", small_config(size) if size == "phi3" else size)
    base, layers = directory / "checkpoint" / "base", LAYERS.get(size, LLAMA_LAYERS)
    adaptable = [*layers, "lm_head"] if size == "mini" else layers  # which is tied
    export_bundle(
        load_adapted(str(base), {}, adaptable=adaptable, max_rank=8), directory / "bundle", precision=precision
    )
    python, native = both(directory / "bundle")
    yield Given(base, layers, directory / "bundle", python, native)
    native.close()


@pytest.fixture
def own(given: Given) -> Iterator[Given]:
    """The same, with no adapter loaded before or after."""
    yield given
    for name in list(given.python.adapters.names):
        given.python.unload_adapter(name)
    for name in given.native.list_adapters():
        given.native.unload_adapter(name)


def stored_as(dtype: torch.dtype) -> Any:
    def change(path: Path) -> None:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / TENSOR_FILE).items()}
        save_file(tensors, path / TENSOR_FILE)

    return change


def linked(path: Path) -> None:
    """What a cache of downloads has: links to files elsewhere."""
    for name in (CONFIG_FILE, TENSOR_FILE):
        (path / name).rename(path.parent / name)
        (path / name).symlink_to(f"../{name}")


OPTIONS: dict[str, Any] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 8, "lora_alpha": 3},
    "rank 1": {"r": 1, "lora_alpha": -5},
    "one layer": {"layers_to_transform": [1]},
    "one layer by its pattern": {"layers_to_transform": 1, "layers_pattern": "(?:h|layers)"},
    "all linear layers": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\.(attn|self_attn|mlp)\.(c_attn|c_fc|[qkvgud]\w*_proj)"},
    "activated": {"alora_invocation_tokens": [5, 9]},
    "float16": stored_as(torch.float16),
    "bfloat16": stored_as(torch.bfloat16),
    "float64": stored_as(torch.float64),
    "links": linked,
    "unused options": config(lora_dropout=0.1, eva_config={"rho": 2.0}, fan_in_fan_out=True, new=0, other=[]),
}


def options_of(name: str, layers: list[str]) -> dict[str, Any]:
    """Return the options of peft.LoraConfig of a case, whatever the layers are called."""
    if name == "patterns":
        first, second = layers[:2]
        ranks = {first: 2, rf"[a-z]+\.1\..*{second}": 6}
        return {"rank_pattern": ranks, "alpha_pattern": {rf"0\.\w+\.{first}": 32, second: 0.3}}
    if name == "without some":
        return {"exclude_modules": layers[1:2]}
    return OPTIONS[name] if isinstance(OPTIONS[name], dict) else {}


CASES = [*OPTIONS, "patterns", "without some"]


@pytest.mark.parametrize("name", CASES)
def test_factors_and_tokens_are_those_of_python(name: str, own: Given, tmp_path: Path) -> None:
    directory = own.save(tmp_path / "peft", **options_of(name, own.layers))
    if callable(change := OPTIONS.get(name)):
        change(directory)
    other = own.save(tmp_path / "other", seed=1, r=2)
    for runtime in (own.python, own.native):
        runtime.load_adapter("legal", other)
        runtime.load_adapter("legal", f"{directory}/", replace=True)  # type: ignore[arg-type]
        runtime.load_adapter("other", other)
    assert own.difference("legal") is None
    adapter, listed = own.python.adapters["legal"], own.native.list_adapters()["legal"]
    assert listed[:3] == (adapter.rank, adapter.targets, adapter.size)
    files = (directory / CONFIG_FILE).read_bytes() + (directory / TENSOR_FILE).read_bytes()
    assert listed[3] == hashlib.sha256(files).hexdigest()
    prompts = [*own.python.encode(TEXTS), [7, 5, 9, 301], [5, 9, 17, 44]]
    names = ["legal", None, "other", "legal", "legal"]
    rows = [runtime.generate(prompts, adapters=names, max_new_tokens=8) for runtime in (own.python, own.native)]
    assert rows[0] == rows[1]
    plain = own.python.generate(prompts, max_new_tokens=8)
    assert [row.token_ids for row in rows[0]] != [row.token_ids for row in plain]


@pytest.mark.parametrize("given", KINDS[:1], indirect=True, ids="-".join)
def test_a_tied_head_is_compared(own: Given, tmp_path: Path) -> None:
    directory = own.save(tmp_path / "peft", target_modules=["lm_head"])
    tensors = load_file(directory / TENSOR_FILE)
    stored = "base_model.model.lm_head.base_layer.weight"
    tensors[stored] = torch.tensor(own.python.bundle.token_embedding().stored)  # as some releases of PEFT store it
    save_file(tensors, directory / TENSOR_FILE)
    for runtime in (own.python, own.native):
        runtime.load_adapter("head", directory)
    assert own.difference("head") is None
    tensors[stored][100, 7] += 1e-6
    save_file(tensors, directory / TENSOR_FILE)
    assert refusal(own.native, directory) == refusal(own.python, directory)
    assert "its lm_head differs from the base model's" in refusal(own.native, directory)[1]


@pytest.mark.parametrize("given", KINDS[1:2], indirect=True, ids="-".join)
@pytest.mark.parametrize(
    "fault",
    [{"lora_alpha": 4}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 9}}, {"alora_invocation_tokens": [3]}],
    ids=str,
)
def test_a_planted_fault_is_seen(fault: dict[str, Any], own: Given, tmp_path: Path) -> None:
    """A scaling that is left out, or another, and an invocation: what Python reads has it, and what C++ reads not."""
    directory = own.save(tmp_path / "peft")
    own.native.load_adapter("legal", directory)
    config(**fault)(directory)
    own.python.load_adapter("legal", directory)
    rows = [runtime.generate(TEXTS, adapters=["legal"] * 3, max_new_tokens=8) for runtime in (own.python, own.native)]
    assert rows[0] != rows[1]
    assert own.difference("legal")


def test_factors_are_read_again_from_the_directory(given: Given, tmp_path: Path) -> None:
    native = NativeRuntime(given.bundle, max_adapter_bytes=1)
    directories = [given.save(tmp_path / f"{seed}", seed=seed) for seed in range(2)]
    for directory in directories:
        native.load_adapter(f"peft-{directory.name}", directory)  # the one before leaves
    names = ["peft-0", "peft-1", None]
    expected = native.generate(TEXTS, adapters=names, max_new_tokens=4)
    assert native.generate(TEXTS, adapters=names, max_new_tokens=4) == expected
    config(lora_alpha=9)(directories[0])
    native.generate(TEXTS[:1], adapters=["peft-1"], max_new_tokens=1)
    with pytest.raises(NativeError, match="has changed since it was loaded") as caught:
        native.generate(TEXTS[:1], adapters=["peft-0"], max_new_tokens=1)
    assert caught.value.code == "adapter_invalid"
    native.close()


def refusal(runtime: chameleon_deploy.Runtime | NativeRuntime, path: Path) -> tuple[str, str]:
    """Return the code and the message of an adapter that is refused in place of one that stays."""
    with pytest.raises((ChameleonError, NativeError)) as caught:
        runtime.load_adapter("legal", path, replace=True)
    code = caught.value.code  # type: ignore[attr-defined]
    return code, str(caught.value).removesuffix(f" [{code}]")


# Damages of what JSON, regular expressions and safetensors are: a library of each language says what is wrong, after
# these words.
_JSON, _TENSORS = "not a PEFT LoRA configuration: ", f"{TENSOR_FILE}: "
LIBRARIES = {
    **dict.fromkeys(("no-json", "no-text", "nested-json", "an-endless-alpha", "an-alpha-beyond-float64"), _JSON),
    "a-broken-pattern": f"{CONFIG_FILE}: '((': ",
    "a-broken-pattern-of-ranks": f"{CONFIG_FILE}: '(.*\\\\.)?((()': ",
    **dict.fromkeys(("cut", "empty", "a-header-that-lies", "a-shape-that-overflows", "a-negative-shape",
                     "tensors-that-overlap", "tensors-with-a-gap"), _TENSORS),
}  # fmt: skip
BEYOND: dict[str, Any] = {
    "a-rank-beyond-the-bundle": {"r": 9},
    "a-rank-of-a-layer-beyond-the-bundle": {"rank_pattern": {"q_proj": 12}},
    "a-token-beyond-the-model": {"alora_invocation_tokens": [5, 512]},
    "a-layer-beyond-the-bundle": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("given", KINDS[1:2], indirect=True, ids="-".join)
@pytest.mark.parametrize("name", [*DAMAGES, *BEYOND])
def test_a_directory_is_refused_in_the_words_of_python(name: str, own: Given, tmp_path: Path) -> None:
    good = own.save(tmp_path / "good", target_modules=["q_proj", "v_proj"])
    directory = tmp_path / "damaged"
    if name in BEYOND:
        own.save(directory, **BEYOND[name])
    else:
        DAMAGES[name](Path(shutil.copytree(good, directory)))
    for runtime in (own.python, own.native):
        runtime.load_adapter("legal", good)
    before = own.native.list_adapters()
    expected, found = refusal(own.python, directory), refusal(own.native, directory)
    if words := LIBRARIES.get(name):
        assert words in expected[1]
        expected, found = ((code, message.partition(words)[0]) for code, message in (expected, found))
    assert found == expected
    assert str(directory) in expected[1] or "pattern" in name or "group" in name
    assert own.native.list_adapters() == before
    assert own.difference("legal") is None


@pytest.mark.parametrize("given", KINDS[1:2], indirect=True, ids="-".join)
def test_a_bundle_that_takes_no_adapters_refuses_a_directory(own: Given, tmp_path: Path) -> None:
    """A base without layers for adapters, and a bundle that generates its updates."""
    directory = own.save(tmp_path / "peft")
    export_bundle(load_adapted(str(own.base), {}), tmp_path / "plain")
    for bundle, code in (tmp_path / "plain", "tensor_invalid"), (good_bundle("chameleon_masked"), "adapter_invalid"):
        python, native = both(bundle)
        assert refusal(native, directory) == refusal(python, directory)
        assert refusal(native, directory)[0] == code
        native.close()


@pytest.mark.parametrize("given", KINDS[1:2], indirect=True, ids="-".join)
def test_the_first_pattern_of_the_file_counts(own: Given, tmp_path: Path) -> None:
    """Not the first of the alphabet, in which many readers of JSON have them."""
    directory = own.save(tmp_path / "peft")
    text = json.loads((directory / CONFIG_FILE).read_text()) | {"alpha_pattern": {"v_proj": 3.0, r"1\..*": 5.0}}
    (directory / CONFIG_FILE).write_text(json.dumps(text))
    for runtime in (own.python, own.native):
        runtime.load_adapter("legal", directory)
    assert own.difference("legal") is None
    (directory / CONFIG_FILE).write_text(json.dumps(text | {"alpha_pattern": {r"1\..*": 5.0, "v_proj": 3.0}}))
    own.native.load_adapter("legal", directory, replace=True)
    assert own.difference("legal") == "model.layers.1.self_attn.v_proj.lora_B"
