"""Vectors of the caller over HTTP: what the library computes with them, and typed errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import chameleon_deploy
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from tests.serving import Running, running

SIZE = 24
PROMPTS = ["The river", "A lamp"]
VECTORS = np.random.default_rng(0).normal(scale=3, size=(2, SIZE)).astype(np.float32).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conditioning")
    random_checkpoint(path / "checkpoint", "mini", targets=["attention", "lm_head"], conditioning_size=SIZE)
    export_bundle(load_checkpoint(path / "checkpoint"), path / "wiki")
    return path / "wiki"


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with running(path) as found:
        yield found


def complete(server: Running, **extra: Any) -> list[str]:
    answer = server.openai().completions.create(
        model="wiki", prompt=PROMPTS, max_tokens=8, temperature=0, extra_body=extra
    )  # fmt: skip
    return [choice.text for choice in answer.choices]


def test_each_prompt_has_its_vector(server: Running, path: Path) -> None:
    runtime = chameleon_deploy.load(path, threads=1)
    expected = [row.text for row in runtime.generate(PROMPTS, conditioning=VECTORS, max_new_tokens=8)]
    assert complete(server, conditioning=VECTORS) == expected
    for row, vector in enumerate(VECTORS):
        alone = server.openai().completions.create(
            model="wiki", prompt=PROMPTS[row], max_tokens=8, temperature=0, extra_body={"conditioning": [vector]}
        )  # fmt: skip
        assert alone.choices[0].text == expected[row]
    swapped = complete(server, conditioning=VECTORS[::-1])
    assert all(text != other for text, other in zip(expected, swapped, strict=True))


def test_prompts_are_scored_with_their_vectors(server: Running, path: Path) -> None:
    expected = chameleon_deploy.load(path, threads=1).score(PROMPTS, conditioning=VECTORS)
    echoed = server.openai().completions.create(
        model="wiki", prompt=PROMPTS, max_tokens=0, echo=True, logprobs=0, extra_body={"conditioning": VECTORS}
    )  # fmt: skip
    found: Any = [choice.logprobs.token_logprobs for choice in echoed.choices if choice.logprobs]
    scores = server.post("/v1/score", input=PROMPTS, conditioning=VECTORS).json()["data"]
    found += [[None, *score["token_logprobs"]] for score in scores]
    for ours, theirs in zip(found, expected * (len(found) // 2), strict=True):
        assert ours[0] is None  # nothing predicts the first token
        np.testing.assert_allclose(ours[1:], theirs.token_logprobs, atol=1e-5)


NEEDED = f"this bundle needs conditioning in mode 'request', float32 [texts, {SIZE}]"


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        ({}, "mode_unavailable", f"mode 'request' without conditioning: {NEEDED}"),
        ({"conditioning": None}, "mode_unavailable", NEEDED),
        ({"mode": "none", "conditioning": VECTORS}, "mode_unavailable",
         f"mode 'none' with conditioning: {NEEDED}"),
        ({"conditioning": VECTORS[:1]}, "input_invalid",
         f"conditioning has shape (1, {SIZE}), expected (2, {SIZE}): a vector per text"),
        ({"conditioning": [vector[1:] for vector in VECTORS]}, "input_invalid",
         f"conditioning has shape (2, {SIZE - 1}), expected (2, {SIZE}): a vector per text"),
        ({"conditioning": [VECTORS[0], VECTORS[1][:-1]]}, "input_invalid",
         "conditioning is no array of numbers"),
        ({"conditioning": [VECTORS[0], [1e39] * SIZE]}, "input_invalid",
         "conditioning holds NaN or infinity"),
        ({"conditioning": [VECTORS[0], ["x"] * SIZE]}, "input_invalid",
         "the body is not valid: Expected `float`, got `str` - at `$.conditioning[1][0]`"),
        ({"conditioning": 1.5}, "input_invalid",
         "the body is not valid: Expected `array | null`, got `float` - at `$.conditioning`"),
    ],
    ids=["missing", "null", "mode none", "too few", "too short", "ragged", "infinite", "texts", "a number"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(extra: dict[str, Any], code: str, message: str, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, **extra)
    assert (caught.value.code, caught.value.param) == (code, "conditioning")
    assert message in caught.value.message
