"""Vectors of the caller in C++: the factors, tokens and scores that Python gives a row, and the same codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from tests.cpp.c_interface import NativeError, NativeRuntime

SIZE = 24
ROWS = [[5, 6, 7, 8], [9, 10, 11], [300, 4, 5], [5, 6, 7, 8]]
TASKS = np.random.default_rng(0).normal(scale=3, size=(2, SIZE)).astype(np.float32)
VECTORS = TASKS[[1, 0, 1, 0]]


@pytest.fixture(scope="module", params=[("mini", "shared"), ("llama-mini", "paper")], ids="-".join)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose hypernetwork reads vectors of the caller and updates layers of the trunk and the head."""
    directory = tmp_path_factory.mktemp("conditioning")
    size, architecture = request.param
    random_checkpoint(
        directory / "checkpoint", size, targets=["attention", "lm_head"], architecture=architecture,
        conditioning_size=SIZE,
    )  # fmt: skip
    export_bundle(load_checkpoint(directory / "checkpoint"), directory / "bundle")
    return directory / "bundle"


@pytest.fixture(scope="module")
def python(path: Path) -> Runtime:
    return chameleon_deploy.load(path, threads=1)


@pytest.fixture(scope="module")
def native(path: Path) -> Iterator[NativeRuntime]:
    runtime = NativeRuntime(path, threads=1)
    yield runtime
    runtime.close()


def test_factors_are_those_of_python(python: Runtime, native: NativeRuntime) -> None:
    expected, found = (runtime.adapt(ROWS, conditioning=VECTORS) for runtime in (python, native))
    assert found.factors.factor_ids.tolist() == expected.factors.factor_ids.tolist() == [0, 1, 0, 1]
    assert found.cluster_ids.tolist() == [-1] * len(ROWS)
    assert found.embeddings.tobytes() == expected.embeddings.tobytes()
    assert found.factors.sets.tensors.keys() == expected.factors.sets.tensors.keys()
    for name, tensor in expected.factors.sets.tensors.items():
        assert np.asarray(found.factors.sets.tensors[name]).tobytes() == np.asarray(tensor).tobytes(), name


def test_rows_of_different_vectors_have_the_results_of_python(python: Runtime, native: NativeRuntime) -> None:
    expected, found = (runtime.score(ROWS, conditioning=VECTORS) for runtime in (python, native))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.token_logprobs, theirs.token_logprobs, rtol=1e-6, atol=2e-5)
    assert not np.allclose(found[0].token_logprobs, found[3].token_logprobs, atol=1e-3)  # one text under two tasks
    generations = [runtime.generate(ROWS, conditioning=VECTORS, max_new_tokens=8) for runtime in (python, native)]
    assert generations[0] == generations[1]
    alone = [native.generate([row], conditioning=[vector], max_new_tokens=8)[0]
             for row, vector in zip(ROWS, VECTORS, strict=True)]  # fmt: skip
    assert alone == generations[1]


def test_swapped_vectors_are_seen(native: NativeRuntime) -> None:
    right, swapped = (native.score(ROWS, conditioning=vectors) for vectors in (VECTORS, VECTORS[[1, 0, 3, 2]]))
    for ours, other in zip(right, swapped, strict=True):
        assert not np.allclose(ours.token_logprobs, other.token_logprobs, atol=1e-3)
    tokens = [[row.token_ids for row in native.generate(ROWS, conditioning=vectors, max_new_tokens=8)]
              for vectors in (VECTORS, VECTORS[[1, 0, 3, 2]])]  # fmt: skip
    assert all(ours != other for ours, other in zip(*tokens, strict=True))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"mode": "request"},
        {"mode": "static"},
        {"mode": "none", "conditioning": VECTORS},
        {"mode": "cohort", "conditioning": VECTORS},
        {"mode": "centroid"},
        {"conditioning": VECTORS[:, :5]},
        {"conditioning": np.zeros((4, 0), np.float32)},
        {"conditioning": VECTORS * np.nan},
        {"conditioning": VECTORS * np.inf},
    ],
    ids=str,
)
def test_what_cannot_be_meant_has_the_same_code_and_message(
    how: dict[str, Any], python: Runtime, native: NativeRuntime
) -> None:
    with pytest.raises(ChameleonError) as expected:
        python.adapt(ROWS, **how)
    with pytest.raises(NativeError) as found:
        native.adapt(ROWS, **how)
    assert found.value.code == expected.value.code
    if "conditioning" in str(expected.value):
        assert str(found.value) == f"{expected.value} [{expected.value.code}]"


def test_a_bundle_of_embeddings_takes_none(mini_bundles: dict[str, Path]) -> None:
    native = NativeRuntime(mini_bundles["chameleon"])
    with pytest.raises(NativeError, match="takes no conditioning") as caught:
        native.adapt(ROWS, mode="request", conditioning=VECTORS)
    assert caught.value.code == "mode_unavailable"
    native.close()
