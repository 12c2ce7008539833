"""A model repository of Triton: what is written. tests/serve/test_triton.py serves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import DigestError, OutputExistsError
from chameleon_deploy.triton import write_repository
from tests.commands import run


def test_a_repository_holds_the_bundle(bundle: Path, tmp_path: Path) -> None:
    result = run("chameleon_deploy.triton", bundle, "--out", tmp_path / "models")
    assert result.returncode == 0, result.stderr
    model = tmp_path / "models" / bundle.name
    assert result.stdout.strip() == str(model)
    assert open_bundle(model / "1" / "bundle").digest == open_bundle(bundle).digest
    config = (model / "config.pbtxt").read_text()
    assert f'name: "{bundle.name}"' in config and "decoupled: true" in config
    assert config.count("{") == config.count("}") and config.count("[") == config.count("]")
    compile((model / "1" / "model.py").read_text(), "model.py", "exec")
    with pytest.raises(OutputExistsError):
        write_repository(bundle, tmp_path / "models")


def test_a_damaged_bundle_is_not_written(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "weights.bin").write_bytes(b"damaged")
    with pytest.raises(DigestError):
        write_repository(copy, tmp_path / "models")
    assert not (tmp_path / "models" / "copy").exists()


@pytest.mark.parametrize("arguments", [[], ["--out", "models"]])
def test_bad_usage(arguments: list[str], mini_path: Path, tmp_path: Path) -> None:
    result = run("chameleon_deploy.triton", mini_path, *arguments, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())
