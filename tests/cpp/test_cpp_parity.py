"""The C++ runtime against the Python runtime, on the same bundle and the same ONNX Runtime.

CHAMELEON_EXAMPLES=1000 compares as many batches; a run of the suite compares a few.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from chameleon_deploy.runtime import Sampling
from tests.cpp.c_interface import NativeError, NativeRuntime
from tests.cpp.parity import largest_difference, random_batch
from tests.rows import head_factors

EXAMPLES = int(os.environ.get("CHAMELEON_EXAMPLES", "120"))


def factors(value: float = 1) -> dict[str, Any]:
    return head_factors(np.full((1, 64), value, np.float32), np.full((1, 512), value, np.float32))


@pytest.mark.parametrize("kind", ["chameleon", "lora", "llama", "int8", "llama-int8", "int4", "given", "given-int8"])
def test_random_ragged_batches_agree_in_all_modes(mini_bundles: dict[str, Path], kind: str) -> None:
    batches = EXAMPLES if kind == "chameleon" else EXAMPLES // 4
    assert largest_difference(mini_bundles[kind], batches) <= 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_bundle_of_16_bits_is_refused(precision: Any, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", "mini")
    export_bundle(load_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", precision=precision)
    with pytest.raises(NativeError, match="--precision fp32") as error:
        NativeRuntime(tmp_path / "bundle")
    assert error.value.code == "manifest_invalid"


def test_streamed_text_is_the_same(mini_bundles: dict[str, Path]) -> None:
    python = chameleon_deploy.load(mini_bundles["chameleon"])
    native = NativeRuntime(mini_bundles["chameleon"])
    random = np.random.default_rng(6)
    for _ in range(20):
        rows, how = random_batch(random, python, "cohort")
        sampling = Sampling(temperature=1.5, seed=int(random.integers(2**32)), stop=["er", "e r", "\ufffd"])
        expected = [
            (token.row, token.token_id, token.text, token.generation is not None)
            for token in python.stream(rows, max_new_tokens=30, sampling=sampling, **how)
        ]
        actual: list[Any] = []

        def on_token(*token: Any, seen: list[Any] = actual) -> bool:
            seen.append(token)
            return True

        native.generate(rows, max_new_tokens=30, sampling=sampling, **how, on_token=on_token)
        assert actual == expected
    native.close()


def test_a_cancelled_row_leaves_the_others_alone(mini_bundles: dict[str, Path]) -> None:
    native = NativeRuntime(mini_bundles["chameleon"])
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    alone = native.generate(rows, max_new_tokens=12, mode="cohort")
    seen = [0, 0, 0]

    def on_token(row: int, _token_id: int, _text: str, _finished: bool) -> bool:
        seen[row] += 1
        return row != 1 or seen[row] < 4

    cancelled = native.generate(rows, max_new_tokens=12, mode="cohort", on_token=on_token)
    assert str(cancelled[1].finish_reason) == "cancelled"  # a reason that the Python runtime has no use for
    assert cancelled[1].token_ids == alone[1].token_ids[:4]
    assert [cancelled[0], cancelled[2]] == [alone[0], alone[2]]
    native.close()


@pytest.mark.parametrize(
    ("texts", "how"),
    [
        ([], {}),
        ([""], {}),
        (["a", [1]], {}),
        ([b"\xff"], {}),
        ([[]], {}),
        ([[512]], {}),
        ([[-1]], {}),
        ([[1] * 129], {}),
        (["a"], {"mode": "tenant"}),
        (["a"], {"mode": "cohort", "tenants": ["x"]}),
        (["a"], {"mode": "static"}),
        (["a"], {"mode": "nonsense"}),
        (["a"], {"mode": "cohort", "factors": factors()}),
        (["a"], {"mode": "static", "factors": factors(np.nan)}),
        (["a"], {"mode": "static", "factors": factors(3e38)}),
        (["a"], {"mode": "static", "factors": {}}),
        (["a"], {"mode": "static", "factors": {"lm_head.lora_A": np.ones((1, 64), np.float32)}}),
        (["a"], {"mode": "static", "factors": factors() | {"lora_A": np.ones((1, 64), np.float32)}}),
        (["a"], {"mode": "static", "factors": factors() | {"lm_head.lora_A": np.ones((2, 64), np.float32)}}),
        (["a"], {"mode": "static", "factors": factors() | {"lm_head.lora_A": np.ones((1, 63), np.float32)}}),
        (["a"], {"sampling": {"temperature": -1.0}}),
        (["a"], {"sampling": {"top_p": 1.5}}),
        (["a"], {"sampling": {"top_k": -1}}),
        (["a"], {"sampling": {"presence_penalty": 3.0}}),
        (["a"], {"sampling": {"logit_bias": ((5, 101.0),)}}),
        (["a"], {"sampling": {"logprobs": 21}}),
        (["a"], {"max_new_tokens": -1}),
    ],
)
def test_a_users_mistake_has_the_same_code(mini_bundles: dict[str, Path], texts: Any, how: dict[str, Any]) -> None:
    python = chameleon_deploy.load(mini_bundles["chameleon"])
    native = NativeRuntime(mini_bundles["chameleon"])
    settings = how.pop("sampling", None)
    readable = [text.decode(errors="surrogateescape") if isinstance(text, bytes) else text for text in texts]
    with pytest.raises(ChameleonError) as expected:
        python.generate(readable, **how | ({"sampling": Sampling(**settings)} if settings else {}))
    if settings:  # the Python class refuses such a Sampling, so only the C++ side gets one
        sampling = Sampling()
        for name, value in settings.items():
            object.__setattr__(sampling, name, value)
        how["sampling"] = sampling
    with pytest.raises(NativeError) as actual:
        native.generate(texts, **how)
    assert actual.value.code == expected.value.code
    native.close()
