"""Commands in environments that are not a developer's terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint, save_checkpoint
from tests.commands import call, run

TEXT = "caf\u00e9 \u6cb3 \U0001f98e"


def _generate(bundle: Path, *more: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("chameleon_deploy.generate", bundle, "--prompt", TEXT, "--max-new-tokens", 3, *more, **options)


def _shell(bundle: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A script of bash, in which `generate` is the command."""
    command = f"{sys.executable} -m chameleon_deploy.generate {bundle} --prompt x --max-new-tokens 2 --json"
    script = f'set -o pipefail\ngenerate() {{ {command} "$@"; }}\n{script}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_optimised_python(bundle: Path) -> None:
    """python -O removes assertions: no check may be one."""
    plain = _generate(bundle, "--json")
    assert _generate(bundle, "--json", env={"PYTHONOPTIMIZE": "2"}).stdout == plain.stdout
    refused = run("chameleon_deploy.generate", bundle, "--prompt", "", env={"PYTHONOPTIMIZE": "2"})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_that_lacks_characters(bundle: Path, encoding: str) -> None:
    env = {"PYTHONIOENCODING": encoding}
    plain = call("chameleon_deploy.generate", bundle, "--prompt", TEXT, "--max-new-tokens", 3, "--json")
    shown = _generate(bundle, "--json", env=env)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout) == json.loads(plain.stdout)
    table = _generate(bundle, env=env, encoding=encoding)
    assert (table.returncode, table.stderr) == (0, "")
    refused = run("chameleon_deploy.score", bundle, "--text", f"{TEXT}.txt", env=env, encoding=encoding)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("buffering", ["unset PYTHONUNBUFFERED", "export PYTHONUNBUFFERED=1"])
def test_a_reader_that_goes_away_is_no_error(bundle: Path, buffering: str) -> None:
    """It is noticed by the print that follows, or when the buffer is written at the end."""
    result = _shell(bundle, f"{buffering}; generate | true")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", ["generate >&-", "generate > /dev/full"])
def test_output_that_cannot_be_written_is_one_line(bundle: Path, script: str) -> None:
    result = _shell(bundle, script)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "[output_failed]" in result.stderr


def test_a_closed_standard_error(bundle: Path) -> None:
    result = _shell(bundle, "generate 2>&-")
    assert result.returncode == 0
    assert json.loads(result.stdout)["token_ids"]
    refused = _shell(bundle, "generate --top-k -1 2>&-")
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize("home", ["/proc/self/no-such-home", None])
def test_a_home_that_is_missing_or_read_only(
    bundle: Path, mini_path: Path, tmp_path: Path, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"HOME": home, "XDG_CACHE_HOME": None, "CHAMELEON_DEPLOY_CACHE": None, "HF_HOME": None}
    assert _generate(bundle, "--json", env=env).returncode == 0
    export: list[Any] = ["chameleon_deploy.export", mini_path, "--out", tmp_path / "out", "--no-verify"]
    if home:  # in a process of its own: packages that it imports look for a place for their caches then
        exported = run(*export, env=env)
    else:
        for name in env:
            monkeypatch.delenv(name, raising=False)
        exported = call(*export)
    assert exported.returncode == 0, exported.stderr
    listed = run("chameleon_deploy.cache", "list", env=env)
    assert listed.returncode == 0, listed.stderr


def test_a_path_with_spaces_and_other_letters(bundle: Path, mini_path: Path, tmp_path: Path) -> None:
    directory = tmp_path / f"my {TEXT} [bold]"
    directory.mkdir()
    shutil.copytree(bundle, directory / "a bundle")
    shutil.copytree(mini_path, directory / "a checkpoint")
    (directory / "some texts.txt").write_text("one\n\ntwo\n")
    scored = call("chameleon_deploy.score", directory / "a bundle", "--text", directory / "some texts.txt", "--json")
    assert len(scored.stdout.splitlines()) == 2, scored.stderr
    out = directory / "another bundle"
    exported = call("chameleon_deploy.export", directory / "a checkpoint", "--out", out, "--no-verify")
    assert exported.returncode == 0, exported.stderr
    assert _generate(out, "--json").stdout == _generate(bundle, "--json").stdout
    refused = call("chameleon_deploy.export", directory / "a checkpoint", "--out", out)
    assert str(out) in refused.stderr


def test_shared_weights_in_a_path_with_spaces(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import chameleon_deploy

    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / f"my {TEXT}"))
    plain = chameleon_deploy.load(bundle, threads=1).score(["x y z"])
    for _ in range(2):
        assert chameleon_deploy.load(bundle, threads=1, share_weights=True).score(["x y z"]) == plain


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_files_have_the_modes_of_the_umask(mini: Checkpoint, tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors writes files that only their owner can read."""
    with _umask(umask):
        export_bundle(mini, tmp_path / "out")
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {mode}
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2


def test_checkpoint_files_have_the_modes_of_the_umask(mini: Checkpoint, tmp_path: Path) -> None:
    with _umask(0o027):
        save_checkpoint(tmp_path, mini.config, mini.factors, mini.centroids)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}
