"""The C++ library gives what Python gives, in the precisions that it loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import chameleon_deploy
from tests.cpp.c_interface import NativeRuntime
from tests.processors.record import Reference


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_scores_and_tokens_are_those_of_python(recorded: Path, reference: Reference, precision: str) -> None:
    bundle, rows = recorded / precision, [ids[:6] for ids in reference.rows[:2]]
    python, native = chameleon_deploy.load(bundle, threads=1), NativeRuntime(bundle, threads=1)
    for actual, expected in zip(native.score(rows), python.score(rows), strict=True):
        np.testing.assert_allclose(actual.token_logprobs, expected.token_logprobs, atol=1e-5)
    assert native.generate(rows, max_new_tokens=3) == python.generate(rows, max_new_tokens=3)
    native.close()
