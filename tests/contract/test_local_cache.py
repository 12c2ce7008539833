"""The cache of what depends on one machine: built once, used only when intact."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from chameleon_deploy.errors import OutputError
from chameleon_deploy.local_cache import ENTRY, cache_root, entry_path, find, find_or_build

KEY = {"bundle": "ab" * 32, "device": "a GPU", "version": "1.2"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))


def _build(directory: Path) -> None:
    (directory / "engine").write_bytes(b"engine")


def _refuse(directory: Path) -> None:
    raise AssertionError("built again")


def test_an_entry_is_built_once() -> None:
    assert find("engines", KEY) is None
    path = find_or_build("engines", KEY, _build)
    assert (path / "engine").read_bytes() == b"engine"
    assert find_or_build("engines", KEY, _refuse) == path == find("engines", KEY)


@pytest.mark.parametrize("field", KEY)
def test_every_field_of_the_key_counts(field: str) -> None:
    find_or_build("engines", KEY, _build)
    assert find("engines", {**KEY, field: "other"}) is None


def _flip(path: Path) -> None:
    (path / "engine").write_bytes(b"Engine")


def _cut(path: Path) -> None:
    (path / "engine").write_bytes(b"engin")


def _remove(path: Path) -> None:
    (path / "engine").unlink()


def _add(path: Path) -> None:
    (path / "more").write_bytes(b"")


def _link(path: Path) -> None:
    (path / "engine").rename(path.parent / "elsewhere")
    (path / "engine").symlink_to(path.parent / "elsewhere")


def _no_json(path: Path) -> None:
    (path / ENTRY).write_bytes(b"{")


def _foreign(path: Path) -> None:
    text = (path / ENTRY).read_text()
    (path / ENTRY).write_text(text.replace("a GPU", "another GPU"))


@pytest.mark.parametrize("damage", [_flip, _cut, _remove, _add, _link, _no_json, _foreign])
def test_a_damaged_entry_is_built_again(damage: Callable[[Path], None]) -> None:
    damage(find_or_build("engines", KEY, _build))
    assert find("engines", KEY) is None
    path = find_or_build("engines", KEY, _build)
    assert (path / "engine").read_bytes() == b"engine"
    assert find("engines", KEY) == path


def test_a_failed_build_leaves_nothing() -> None:
    def fail(directory: Path) -> None:
        _build(directory)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        find_or_build("engines", KEY, fail)
    assert not entry_path("engines", KEY).exists()


def _count_builds(log: Path) -> None:
    def build(directory: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        _build(directory)

    find_or_build("engines", KEY, build)


def test_processes_wait_for_the_one_that_builds(tmp_path: Path) -> None:
    processes = [multiprocessing.Process(target=_count_builds, args=(tmp_path / "log",)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="CHAMELEON_DEPLOY_CACHE"):
        find_or_build("engines", KEY, _build)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHAMELEON_DEPLOY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "chameleon-deploy"
