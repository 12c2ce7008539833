"""Mistakes in the types of arguments are InputErrors that say what to pass, and cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.errors import InputError

PROMPTS = ["one", "two"]


@pytest.mark.parametrize(
    "value", [2.5, "3", None, True, [1, 2.0], ["1", "2"], [1], np.array([1.0, 2.0]), {"a": 1}, b"ab"]
)
def test_max_new_tokens(runtime: Runtime, value: Any) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        runtime.generate(PROMPTS, max_new_tokens=value)


@pytest.mark.parametrize("value", [np.int64(2), np.uint8(2), [2, np.int32(2)], np.array([2, 2]), (2, 2)])
def test_every_kind_of_integer_is_taken(runtime: Runtime, value: Any) -> None:
    assert runtime.generate(PROMPTS, max_new_tokens=value) == runtime.generate(PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize("tenants", [[["a"], ["b"]], [("a", []), "b"], [{}, {}], "ab", b"ab", 5, {"a", "b"}])
def test_tenants(runtime: Runtime, tenants: Any) -> None:
    with pytest.raises(InputError, match="tenant"):
        runtime.adapt(PROMPTS, mode="tenant", tenants=tenants)


def test_tenants_that_are_equal_and_of_different_types_share_no_factors(runtime: Runtime) -> None:
    adaptation = runtime.adapt(["same"] * 4, mode="tenant", tenants=[1, True, 1.0, 1])
    assert adaptation.factors.factor_ids.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "texts", [[[1, [2]]], [[[1, 2], [3]]], [[1.5]], [[None]], [{"a": 1}], [5], [[2**70]], [[True]], [object()], [[1j]]]
)
def test_token_ids(runtime: Runtime, texts: Any) -> None:
    with pytest.raises(InputError, match="neither a string nor a list of integers"):
        runtime.score(texts)


@pytest.mark.parametrize("threads", [0, -1, 2**40, 1_000_000, 1.5, "2", True])
def test_threads(bundle: Path, threads: Any) -> None:
    with pytest.raises(InputError, match="threads"):
        chameleon_deploy.load(bundle, threads=threads)


@pytest.mark.parametrize("path", [5, None, b"x", ["x"]])
def test_a_path(path: Any) -> None:
    with pytest.raises(InputError, match="path"):
        chameleon_deploy.load(path)


def test_sessions_check_threads_too(bundle: Path) -> None:
    from chameleon_deploy.bundle import open_bundle
    from chameleon_deploy.runtime.session import open_session

    opened = open_bundle(bundle)
    with pytest.raises(InputError, match="threads must be from 1 to 1024"):
        open_session(opened, opened.manifest.graphs["decoder_cpu"], 2**40)
