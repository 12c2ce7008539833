"""What goes wrong while a graph runs is a ChameleonError, in every decoder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy import Runtime
from chameleon_deploy.bundle import open_bundle
from chameleon_deploy.errors import GraphError, LengthError, TensorError
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


def test_a_failing_decoder(runtime: Runtime, portable: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (runtime, portable):
        decoder: Any = each.decoder
        monkeypatch.setattr(decoder, "session", _Failing(decoder.session))
        with pytest.raises(GraphError, match=r"ONNX Runtime failed.*FAIL : Non-zero"):
            each.generate([[1, 2]], max_new_tokens=2)


def test_a_failing_scorer_and_hypernetwork(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, backend = runtime.decoder, runtime.backend
    with monkeypatch.context() as patch:
        scorer: Any = decoder.scorer  # type: ignore[attr-defined]
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
            decoder._buffers(1, capacity)
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
