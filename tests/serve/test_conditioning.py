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
from tests.serving import STARTS, Running

SIZE = 24
PROMPTS = ["The river", "A lamp"]
VECTORS = np.random.default_rng(0).normal(scale=3, size=(2, SIZE)).astype(np.float32).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conditioning")
    random_checkpoint(path / "checkpoint", "mini", targets=["attention", "lm_head"], conditioning_size=SIZE)
    export_bundle(load_checkpoint(path / "checkpoint"), path / "wiki", None)
    return path / "wiki"


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Running]:
    with STARTS["python"](path) as found:
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
    assert complete(server, conditioning=VECTORS[::-1]) != expected
    scores = server.post("/v1/score", input=PROMPTS, conditioning=VECTORS).json()["data"]
    for ours, theirs in zip(scores, runtime.score(PROMPTS, conditioning=VECTORS), strict=True):
        np.testing.assert_allclose(ours["token_logprobs"], theirs.token_logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "code", "param"),
    [
        ({}, "mode_unavailable", None),
        ({"mode": "none", "conditioning": VECTORS}, "mode_unavailable", None),
        ({"conditioning": VECTORS[:1]}, "input_invalid", "conditioning"),
        ({"conditioning": [VECTORS[0], VECTORS[1][:-1]]}, "input_invalid", "conditioning"),
        ({"conditioning": [VECTORS[0], [1e39] * SIZE]}, "input_invalid", "conditioning"),
    ],
    ids=["missing", "mode none", "too few", "ragged", "infinite"],
)
def test_what_does_not_fit_is_refused(extra: dict[str, Any], code: str, param: str | None, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, **extra)
    assert caught.value.code == code
    if param:
        assert caught.value.param == param
