"""The cache of what depends on one machine: built once, used only when intact."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chameleon_deploy.directory import MARKER
from chameleon_deploy.errors import OutputError, PathError
from chameleon_deploy.store.local_cache import ENTRY, cache_root, entry_path, find, find_or_build, prune, stored

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


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHAMELEON_DEPLOY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OutputError, match="CHAMELEON_DEPLOY_CACHE"):
        cache_root()


def test_the_cache_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = find_or_build("engines", KEY, _build)
    finally:
        os.umask(before)
    assert [directory.stat().st_mode & 0o777 for directory in (path, path.parent, path.parent.parent)] == [0o700] * 3


def _by_others(path: Path) -> None:
    path.chmod(0o777)


def _by_the_group(path: Path) -> None:
    path.chmod(0o770)


def _of_another(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(path, 65534, 65534)


def _behind_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("make", [_by_others, _by_the_group, _of_another, _behind_a_link])
@pytest.mark.parametrize("level", ["root", "kind", "entry"])
def test_what_others_could_have_made_is_not_used(make: Callable[[Path], None], level: str) -> None:
    """The digests of a foreign entry fit, since whoever wrote the files wrote the digests."""
    entry = find_or_build("engines", KEY, _build)
    make({"root": cache_root(), "kind": entry.parent, "entry": entry}[level])
    if make is _behind_a_link and level == "root":  # the user's own choice
        assert find("engines", KEY) == entry
    elif level == "entry":
        assert find("engines", KEY) is None
        assert find_or_build("engines", KEY, _build) == entry
        assert not entry.is_symlink()
        assert entry.stat().st_uid == os.geteuid()
    else:
        for use in (lambda: find("engines", KEY), lambda: find_or_build("engines", KEY, _refuse), stored, prune):
            with pytest.raises(PathError, match="CHAMELEON_DEPLOY_CACHE"):
                use()


def _entry(name: str, size: int, days: float) -> Path:
    """An entry that was last used some days ago."""

    def build(directory: Path) -> None:
        (directory / "f").write_bytes(bytes(size))

    path = find_or_build("engines", {"name": name}, build)
    then = time.time() - days * 86400
    os.utime(path / ENTRY, (then, then))
    return path


def test_entries_are_listed_by_last_use() -> None:
    paths = [_entry(name, 10, days) for name, days in (("b", 2), ("c", 3), ("a", 1))]
    assert [entry.key for entry in stored()] == [{"name": name} for name in "abc"]
    assert {entry.path for entry in stored()} == set(paths)
    find("engines", {"name": "c"})  # which uses it
    assert [entry.key for entry in stored()] == [{"name": name} for name in "cab"]


def test_old_entries_are_deleted() -> None:
    kept, old = _entry("new", 10, 1), _entry("old", 10, 3)
    assert [entry.path for entry in prune(max_age=2 * 86400)] == [old]
    assert kept.exists()
    assert not old.exists()


def test_entries_of_a_clock_that_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = _entry("new", 10, 0), time.time()
    monkeypatch.setattr(time, "time", lambda: now - 10**9)
    assert prune(max_age=60) == []
    assert find("engines", {"name": "new"}) == path
    assert [entry.path for entry in prune(max_bytes=0)] == [path]


def test_the_least_recently_used_entries_are_deleted() -> None:
    paths = [_entry(name, 1000, days) for days, name in enumerate("abcd")]
    size = stored()[0].size
    assert [entry.path for entry in prune(max_bytes=2 * size)] == paths[2:]
    assert [path.exists() for path in paths] == [True, True, False, False]
    assert len(prune(max_bytes=0)) == 2
    assert not stored()


def test_only_the_caches_own_directories_are_deleted(tmp_path: Path) -> None:
    entry = _entry("x", 10, 5)
    foreign = [entry.parent / "thesis", entry.parent / f".{'0' * 32}.partial", cache_root() / "photos"]
    for directory in foreign:
        directory.mkdir()
    left_over = entry.parent / f".{'1' * 32}.partial"
    left_over.mkdir()
    (left_over / MARKER).touch()
    damaged = entry.parent / ("2" * 32)
    damaged.mkdir()
    (entry.parent / ("3" * 32)).symlink_to(tmp_path)
    assert {entry.path for entry in prune()} == {left_over, damaged}
    assert {entry.path for entry in prune(max_bytes=0)} == {entry}
    assert all(directory.exists() for directory in foreign)


def test_an_entry_that_is_being_built_is_left_alone() -> None:
    other = _entry("x", 10, 5)

    def build(directory: Path) -> None:
        with pytest.raises(OutputError, match="another process is building"):
            prune(max_bytes=0)
        _build(directory)

    assert find_or_build("engines", KEY, build).exists()
    assert other.exists()
