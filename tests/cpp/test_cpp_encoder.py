"""Descriptions of tasks in C++: the factors, tokens and scores that Python gives a row, and the same codes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.errors import ChameleonError
from tests.cpp.c_interface import BUILD, NativeError, NativeRuntime
from tests.damage import edit
from tests.shared_data import good_bundle

ROWS = [[5, 6, 7, 8], [9, 10, 11], [300, 4, 5], [5, 6, 7, 8]]
TOLD = "answer like a lawyer"
EACH = ["write code, x!", TOLD, "the court finds", TOLD]


@pytest.fixture(scope="module", params=["plain", "released"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an encoder; that of a released network brings embeddings to a length and ends descriptions."""
    path = tmp_path_factory.mktemp("encoder") / "bundle"
    copytree(good_bundle("chameleon_given"), path)
    if request.param == "released":
        edit(encoder__conditioning_norm=5**0.5, encoder__full_stop=True)(path)
    return path


@pytest.fixture(scope="module")
def python(path: Path) -> Runtime:
    return chameleon_deploy.load(path, threads=1)


@pytest.fixture(scope="module")
def native(path: Path) -> Iterator[NativeRuntime]:
    runtime = NativeRuntime(path, threads=1)
    yield runtime
    runtime.close()


def compare(python: Runtime, native: NativeRuntime, told: str | list[str]) -> Any:
    """Return the factors of each row in C++, after a comparison with Python's."""
    expected, found = (runtime.adapt(ROWS, adapt_text=told).factors for runtime in (python, native))
    assert found.factor_ids.tolist() == expected.factor_ids.tolist()
    for name, tensor in expected.sets.tensors.items():
        np.testing.assert_allclose(found.sets.tensors[name], np.asarray(tensor), rtol=1e-6, atol=1e-6)
    return np.asarray(found.sets.tensors["lm_head.lora_B"])[found.factor_ids]


@pytest.mark.parametrize("told", [TOLD, EACH], ids=["one", "each"])
def test_rows_have_the_results_of_python(told: str | list[str], python: Runtime, native: NativeRuntime) -> None:
    compare(python, native, told)
    expected, found = (runtime.score(ROWS, adapt_text=told) for runtime in (python, native))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.token_logprobs, theirs.token_logprobs, rtol=1e-6, atol=2e-5)
    generations = [runtime.generate(ROWS, adapt_text=told, max_new_tokens=8) for runtime in (python, native)]
    assert generations[0] == generations[1]
    if not isinstance(told, str):  # one text under two descriptions
        assert not np.allclose(found[0].token_logprobs, found[3].token_logprobs, atol=1e-3)


@pytest.mark.parametrize(
    "told", [" \t\x1c\u3000answer\u2028 \x1f", "answer.", "x 1", "\u00e9", "\u4e2d", "\u0e40\u0e31", "answer\u0301"]
)
def test_a_letter_at_the_end_gets_a_full_stop_as_in_python(told: str, python: Runtime, native: NativeRuntime) -> None:
    factors = compare(python, native, told)
    assert np.array_equal(factors, compare(python, native, told))  # from memory
    assert np.ptp(factors, 0).max() == 0  # one for all


def test_more_descriptions_than_are_remembered(python: Runtime, native: NativeRuntime) -> None:
    words = ["answer", "like", "a", "lawyer", "the", "court", "finds"]
    told = [f"{a} {b} {c}" for a in words for b in words for c in words]
    rows = [[5]] * len(told)
    expected, found = (runtime.adapt(rows, adapt_text=told).factors for runtime in (python, native))
    again = native.adapt(rows, adapt_text=told).factors
    for name, tensor in expected.sets.tensors.items():
        np.testing.assert_allclose(found.sets.tensors[name], np.asarray(tensor), rtol=1e-6, atol=1e-6)
        assert np.array_equal(again.sets.tensors[name], found.sets.tensors[name])


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "none", "adapt_text": TOLD},
        {"mode": "static", "adapt_text": TOLD},
        {"mode": "cohort", "adapt_text": TOLD},
        {"adapt_text": [TOLD] * 2},
        {"adapt_text": []},
        {"adapt_text": ""},
        {"adapt_text": " \n"},
        {"adapt_text": [TOLD, TOLD, "", TOLD]},
        {"adapt_text": "a " * 40},
        {"adapt_text": TOLD, "conditioning": np.zeros((4, 5), np.float32)},
    ],
    ids=str,
)
def test_what_describes_nothing_has_the_same_code_and_message(
    how: dict[str, Any], python: Runtime, native: NativeRuntime
) -> None:
    with pytest.raises(ChameleonError) as expected:
        python.adapt(ROWS, **how)
    with pytest.raises(NativeError) as found:
        native.adapt(ROWS, **how)
    assert found.value.code == expected.value.code
    if how.get("mode") != "cohort":  # which no description has to do with
        assert str(found.value) == f"{expected.value} [{expected.value.code}]"


def test_what_is_no_text_and_no_encoder(native: NativeRuntime) -> None:
    with pytest.raises(NativeError, match=r"text 0: .*UTF-8") as caught:
        native.adapt(ROWS, adapt_text="\ud800")
    assert caught.value.code == "input_invalid"
    without = NativeRuntime(good_bundle("chameleon_masked"))
    with pytest.raises(NativeError, match="needs a bundle that was exported with --encoder") as caught:
        without.adapt(ROWS, mode="request", adapt_text=TOLD)
    assert caught.value.code == "mode_unavailable"
    without.close()


def test_the_program_takes_descriptions(path: Path, python: Runtime, tmp_path: Path) -> None:
    def call(command: str, *words: Any, each: Any) -> Any:
        told = [word for text in each for word in ("--adapt-text", text)]
        program = [BUILD / "chameleon-run", command, path, *words, "--json", *told]
        return subprocess.run(program, capture_output=True, text=True, check=False)

    prompts = ["The river", "The court"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    for each in ([TOLD], EACH[:2]):
        told = each * 2 if len(each) == 1 else each
        result = call("generate", "--prompts", file, "--max-new-tokens", "3", each=each)
        found = [json.loads(line)["token_ids"] for line in result.stdout.splitlines()]
        assert found == [row.token_ids for row in python.generate(prompts, adapt_text=told, max_new_tokens=3)]
        result = call("score", "--text", file, "--batch-size", "1", each=each)
        for line, score in zip(result.stdout.splitlines(), python.score(prompts, adapt_text=told), strict=True):
            np.testing.assert_allclose(json.loads(line)["token_logprobs"], score.token_logprobs, rtol=1e-6, atol=2e-5)
    result = call("generate", "--prompt", "x", each=EACH)
    assert result.returncode == 2
    assert result.stderr == "error: 4 descriptions for 1 texts: pass one, or one per text [input_invalid]\n"
