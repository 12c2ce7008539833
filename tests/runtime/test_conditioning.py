"""Vectors of the caller as conditioning: checked, shared by equal rows, and equal to the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Engine, Runtime
from chameleon_deploy.errors import ChameleonError, InputError, ManifestError, ModeError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from tests.damage import edit
from tests.logits import row_logits
from tests.verification import missed

SIZE = 24
ROWS = [[5, 6, 7, 8], [9, 10, 11], [300, 4, 5], [5, 6, 7, 8]]
TASKS = np.random.default_rng(0).normal(size=(2, SIZE)).astype(np.float32)
VECTORS = TASKS[[1, 0, 1, 0]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("conditioning") / "checkpoint"
    random_checkpoint(path, "mini", targets=["attention", "lm_head"], architecture="shared", conditioning_size=SIZE)
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def path(given: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("conditioning") / "bundle"
    export_bundle(given, path)
    return path


@pytest.fixture(scope="module")
def of_tasks(path: Path) -> Runtime:
    return chameleon_deploy.load(path, threads=1)


def test_every_gate(path: Path, given: Checkpoint) -> None:
    assert not missed(path, given)


def test_rows_have_the_references_logits(of_tasks: Runtime, given: Checkpoint) -> None:
    theirs = inference.adapt(given, ROWS, "request", conditioning=VECTORS)
    for row, score in enumerate(of_tasks.score(ROWS, conditioning=VECTORS)):
        logits = row_logits(given, ROWS[row], theirs, row)[:-1].log_softmax(-1).numpy()
        np.testing.assert_allclose(score.token_logprobs, logits[np.arange(len(logits)), ROWS[row][1:]], atol=1e-4)


def test_rows_of_one_task_share_a_set(of_tasks: Runtime) -> None:
    factors = of_tasks.adapt(ROWS, conditioning=VECTORS).factors
    assert (len(factors.sets), factors.factor_ids.tolist()) == (2, [0, 1, 0, 1])
    first, _, _, last = of_tasks.score(ROWS, conditioning=VECTORS)
    assert not np.allclose(first.token_logprobs, last.token_logprobs, atol=1e-3)  # one text under two tasks
    generated = of_tasks.generate(ROWS, conditioning=VECTORS.tolist(), max_new_tokens=3)
    assert [len(generation.token_ids) for generation in generated] == [3] * 4


@pytest.mark.parametrize(
    ("conditioning", "mode", "error", "message"),
    [
        (None, None, ModeError, "needs conditioning"),
        (VECTORS, "none", ModeError, "mode 'none' with conditioning"),
        (VECTORS[:3], None, InputError, r"shape \(3, 24\), expected \(4, 24\)"),
        (VECTORS[:, :5], None, InputError, "a vector per text"),
        (VECTORS * np.nan, None, InputError, "NaN"),
        ([[1.0], [1.0, 2.0]], None, InputError, "no array of numbers"),
        ("task", None, InputError, "no array of numbers"),
        (VECTORS, "cohort", ModeError, "cannot be served"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    conditioning: Any, mode: Any, error: type[ChameleonError], message: str, of_tasks: Runtime
) -> None:
    with pytest.raises(error, match=message):
        of_tasks.adapt(ROWS, mode=mode, conditioning=conditioning)


def test_a_bundle_of_embeddings_takes_none(runtime: Runtime) -> None:
    with pytest.raises(ModeError, match="takes no conditioning"):
        runtime.score([[1, 2]], mode="request", conditioning=np.zeros((1, 64), np.float32))


def test_the_engine_takes_a_vector_per_prompt(of_tasks: Runtime) -> None:
    expected = of_tasks.generate(ROWS, conditioning=VECTORS, max_new_tokens=3)
    with Engine(of_tasks) as engine:
        stream = engine.submit(ROWS, mode="request", conditioning=VECTORS, max_new_tokens=3)
        assert [row.token_ids for row in stream.result()] == [row.token_ids for row in expected]
        with pytest.raises(ModeError, match="needs conditioning"):
            engine.submit(ROWS, mode="request")
        with pytest.raises(InputError, match="a vector per text"):
            engine.submit(ROWS, mode="request", conditioning=VECTORS[:2])
        engine.submit(["a"], mode="none", max_new_tokens=1).result()


@pytest.mark.parametrize("changes", [{"conditioning_size": -1}, {"num_clusters": 2}, {"regime": "lora"}], ids=str)
def test_a_manifest_that_contradicts_itself(changes: dict[str, Any], path: Path, copy_of: Any) -> None:
    damaged = copy_of(path)
    edit(**{f"adaptation__{name}": value for name, value in changes.items()})(damaged)
    with pytest.raises(ManifestError, match=r"conditioning|num_clusters|centroids|lora"):
        chameleon_deploy.load(damaged, threads=1)
