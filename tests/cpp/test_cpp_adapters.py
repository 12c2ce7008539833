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

import chameleon_deploy
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from tests.adapters import GPT2_LAYERS, LLAMA_LAYERS, save_adapter
from tests.cpp.c_interface import BUILD
from tests.damage import edit

TEXTS = ["The river runs to the sea.", "def main():", "A list of numbers", "one two three four"]
NAMES = ["all", "", "attention", "all"]


@pytest.fixture(scope="module", params=["mini", "llama-mini"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with two adapters of different layers and ranks."""
    directory = tmp_path_factory.mktemp("adapters")
    random_checkpoint(directory / "checkpoint", request.param)
    base = directory / "checkpoint" / "base"
    layers = GPT2_LAYERS if request.param == "mini" else LLAMA_LAYERS
    adapters = {
        "all": save_adapter(base, directory / "all", 1, r=4, lora_alpha=8, target_modules=layers),
        "attention": save_adapter(base, directory / "attention", 2, r=2, target_modules=layers[:1]),
    }
    export_bundle(load_adapted(str(base), adapters), directory / "bundle", None)
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


@pytest.mark.parametrize(("size", "architecture"), [("mini", "shared"), ("llama-mini", "paper")])
def test_generated_factors_of_all_layers(size: str, architecture: Any, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", size, targets=["all"], architecture=architecture)
    export_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", None)
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


def test_vectors_of_the_caller_are_for_python(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", "mini", conditioning_size=8)
    export_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", None)
    result = run("generate", tmp_path / "bundle", ["--prompt", "a"], [])
    assert "[manifest_invalid]" in result.stderr
    assert "caller's vectors" in result.stderr


@pytest.mark.parametrize(
    ("adapters", "code"), [(["nobody"], "adapter_invalid"), (["all", "all"], "input_invalid")], ids=str
)
def test_what_cannot_be_meant_is_refused(adapters: list[str], code: str, path: Path) -> None:
    result = run("generate", path, ["--prompt", "a", "--prompt", "b", "--prompt", "c"], adapters)
    assert (result.returncode, f"[{code}]" in result.stderr) == (2, True)
    static = run("generate", path, ["--prompt", "a", "--mode", "static"], [])
    assert "[mode_unavailable]" in static.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"adaptation__adapters": ["all", "all"]},
        {"adaptation__adapters": ["none", "attention"]},
        {"adaptation__adapters": ["a/b", "attention"]},
        {"adaptation__adapters": []},
        {"adaptation__base_digest": ""},
        {"precision": "int8"},
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
