"""What goes wrong while a graph runs is a ChameleonError, in every decoder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Engine, Runtime, Sampling
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import (
    GraphError,
    InputError,
    LengthError,
    NumericError,
    RequestError,
    TensorError,
)
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from tests.damage import reseal
from tests.shared_data import good_bundle


class _Failing:
    """A session whose runs fail as ONNX Runtime's do: with a type of its own."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        if name.startswith("run"):
            return self._fail
        return getattr(self._session, name)

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL :\n Non-zero status code")


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    bundle = shutil.copytree(good_bundle("chameleon_masked"), tmp_path / "bundle")
    file = bundle / "hypernetwork.onnx"
    file.write_bytes(file.read_bytes().replace(b"factor_sets", b"factor\xa4sets"))
    reseal(bundle)
    with pytest.raises(GraphError, match=r"hypernetwork.onnx: a name .* is not UTF-8"):
        chameleon_deploy.load(bundle)


def test_a_failing_decoder(runtime: Runtime, portable: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (runtime, portable):
        decoder: Any = each.decoder
        monkeypatch.setattr(decoder, "session", _Failing(decoder.session))
        with pytest.raises(GraphError, match=r"ONNX Runtime failed.*FAIL : Non-zero"):
            each.generate([[1, 2]], max_new_tokens=2)


def test_a_failing_scorer_and_hypernetwork(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, backend = runtime.decoder, runtime.backend
    assert isinstance(decoder, SharedCacheDecoder)
    with monkeypatch.context() as patch:
        scorer: Any = decoder.scorer
        patch.setattr(scorer, "session", _Failing(scorer.session))
        with pytest.raises(GraphError):
            runtime.score([[1, 2]])
    sessions: Any = backend.sessions  # type: ignore[attr-defined]
    monkeypatch.setitem(sessions, "hypernetwork", _Failing(sessions["hypernetwork"]))
    with pytest.raises(GraphError):
        runtime.adapt([[1, 2]], mode="request")


def test_a_cache_that_no_memory_holds(runtime: Runtime) -> None:
    decoder: Any = runtime.decoder
    for capacity in (2**45, 2**60):
        with pytest.raises(LengthError, match="no memory for a cache of 1 rows"):
            decoder.slots(1, capacity)
        with pytest.raises(LengthError, match="no memory for a cache of 2 rows"):
            decoder.slots(2, capacity)
    assert runtime.generate([[1, 2]], max_new_tokens=1)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16", "I64", "NONSENSE"])
def test_tensors_of_another_type(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(good_bundle("chameleon_masked"), path)
    size = {"I64": 8, "BF16": 2}.get(dtype, 1) * 3 * 16
    header = json.dumps({"centroids": {"dtype": dtype, "shape": [3, 16], "data_offsets": [0, size]}}).encode()
    (path / "centroids.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    reseal(path)
    with pytest.raises(TensorError, match="centroids"):
        open_bundle(path)


def test_a_directory_that_may_not_be_read() -> None:
    code = (
        "import os, sys, chameleon_deploy\n"
        "from chameleon_deploy.errors import BundleNotFoundError\n"
        "if os.geteuid() == 0:\n    os.seteuid(65534)\n"  # root may read everything
        "try:\n    chameleon_deploy.load(sys.argv[1])\nexcept BundleNotFoundError as error:\n    print(error)\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "b"
        shutil.copytree(good_bundle("lora_masked"), path)
        path.chmod(0)
        found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        path.chmod(0o700)
    assert "cannot read" in found.stdout, found.stderr


class _Tokenizer:
    """A tokenizer that panics at one token: pyo3's PanicException is no Exception."""

    class PanicException(BaseException):
        pass

    def __init__(self, tokenizer: Any, bad: int) -> None:
        self._tokenizer, self._bad = tokenizer, bad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, token_ids: Any, **options: Any) -> str:
        if self._bad in token_ids:
            raise self.PanicException("index out of bounds")
        return str(self._tokenizer.decode(token_ids, **options))


def test_a_tokenizer_that_panics_ends_its_row_only(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2, 3], [7, 8], [9]]
    right = runtime.generate(prompts, max_new_tokens=3, mode="request")
    bad = right[1].token_ids[1]
    monkeypatch.setattr(runtime, "tokenizer", _Tokenizer(runtime.tokenizer, bad))
    found = runtime.generate(prompts, max_new_tokens=3, mode="request", errors="row")
    for before, after in zip(right, found, strict=True):
        if bad in before.token_ids:
            assert (after.finish_reason, type(after.error)) == ("error", RequestError)
        else:
            assert after == before
    with pytest.raises(RequestError, match="cannot decode"):
        runtime.generate(prompts, max_new_tokens=3, mode="request")
    with Engine(runtime, rows=4) as engine:
        streamed = engine.submit(prompts, max_new_tokens=3, mode="request").result(60)
    assert [g.finish_reason for g in streamed] == [g.finish_reason for g in found]


def test_logits_that_are_not_finite_end_their_row_only(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2, 3], [7, 8], [9]]
    right = runtime.generate(prompts, max_new_tokens=4, mode="request")
    step = Slots.step

    def broken(slots: Slots, token_ids: Any, factors: Any) -> Any:
        values = step(slots, token_ids, factors)
        if len(values) == len(prompts):
            values[1] = np.nan
        return values

    monkeypatch.setattr(Slots, "step", broken)
    for sampling in (Sampling(), Sampling(top_k=1, temperature=1.0)):
        found = runtime.generate(prompts, max_new_tokens=4, mode="request", errors="row", sampling=sampling)
        assert [found[0], found[2]] == [right[0], right[2]]
        assert found[1].finish_reason == "error"
        assert isinstance(found[1].error, NumericError)
        assert found[1].token_ids == right[1].token_ids[:1]
    with pytest.raises(NumericError):
        runtime.generate(prompts, max_new_tokens=4, mode="request")
    with pytest.raises(InputError, match="errors must be"):
        runtime.generate(prompts, errors="ignore")  # type: ignore[arg-type]
