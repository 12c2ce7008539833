"""Files and directories that appear whole or not at all, and never through a link or over somebody's files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from chameleon_deploy.directory import MARKER, locked_directory, new_directory, write_whole
from chameleon_deploy.errors import OutputError


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_has_its_content_and_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    file = tmp_path / "tensors.safetensors"
    for value in (1, 2):  # a new file, and one in the place of another
        write_whole(file, lambda path, value=value: save_file({"x": np.full(3, value)}, path))  # type: ignore[misc]
        assert _mode(file) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_temporary_path_keeps_the_suffix(tmp_path: Path) -> None:
    write_whole(tmp_path / "x.npy", lambda path: np.save(path, np.arange(3)))
    assert np.load(tmp_path / "x.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_error_keeps_the_previous_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_text("previous")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_whole(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "previous"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").touch()
    for path, write, message in (
        (tmp_path / "x", full, "No space left"),
        (tmp_path / "gone" / "x", Path.touch, "No such file"),
        (tmp_path / "file" / "x", Path.touch, "Not a directory"),
        (tmp_path, Path.touch, "Is a directory"),
    ):
        with pytest.raises(OutputError, match=message):
            write_whole(path, write)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_device_is_written_to_and_not_replaced() -> None:
    before = Path(os.devnull).stat()
    write_whole(Path(os.devnull), lambda path: path.write_text("gone"))
    assert os.path.samestat(before, Path(os.devnull).stat())


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_directory_has_the_modes_of_the_umask(tmp_path: Path, umask: int) -> None:
    with new_directory(tmp_path / "out") as directory:
        save_file({"x": np.zeros(3)}, directory / "tensors.safetensors")
        (directory / "more").mkdir()
        save_file({"x": np.zeros(3)}, directory / "more" / "tensors.safetensors")
    assert _mode(tmp_path / "out") == 0o777 & ~umask
    assert _mode(tmp_path / "out" / "tensors.safetensors") == 0o666 & ~umask
    assert _mode(tmp_path / "out" / "more" / "tensors.safetensors") == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _link(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim)


def _dangling_link(partial: Path, victim: Path) -> None:
    partial.symlink_to(victim / "gone")


def _somebodys(partial: Path, victim: Path) -> None:
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")


def _link_as_marker(partial: Path, victim: Path) -> None:
    _somebodys(partial, victim)
    (partial / MARKER).symlink_to(victim / "gone")


def _file(partial: Path, victim: Path) -> None:
    partial.write_text("a file")


@pytest.mark.parametrize("plant", [_link, _dangling_link, _somebodys, _link_as_marker, _file])
def test_what_was_not_made_here_is_left_alone(tmp_path: Path, plant: Callable[[Path, Path], None]) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    plant(tmp_path / ".out.partial", victim)
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    with pytest.raises(OutputError, match=r"\.out\.partial"), new_directory(tmp_path / "out"):
        pytest.fail("entered")
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before
    assert (victim / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    os.chown(partial, 65534, 65534)
    with pytest.raises(OutputError, match="another user"), new_directory(tmp_path / "out"):
        pytest.fail("entered")


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from chameleon_deploy.directory import new_directory\n"
        "with new_directory(pathlib.Path(sys.argv[1])) as directory:\n"
        "    (directory / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert (tmp_path / ".out.partial" / "out" / "half").exists()
    with new_directory(tmp_path / "out") as directory:
        assert not list(directory.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_writers_directory_is_not_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is renamed away, and a second writer starts, before the first has ended."""
    first = new_directory(tmp_path / "out")
    (first.__enter__() / "file").write_text("first")
    rename = os.rename

    def rename_and_start_another(source: Path, target: Path) -> None:
        rename(source, target)
        rename(target, tmp_path / "moved")
        with pytest.raises(OutputError, match="another process"), new_directory(tmp_path / "out"):
            pytest.fail("entered while the first holds the lock")

    monkeypatch.setattr(os, "rename", rename_and_start_another)
    first.__exit__(None, None, None)
    assert (tmp_path / "moved" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_lock_on_a_removed_directory_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes its directory between the moments when the next writer opens and locks it."""
    from chameleon_deploy import directory

    path, take = tmp_path / "d", directory.lock
    taken: list[int] = []

    def lock_and_remove(path: Path, *, wait: bool) -> int:
        taken.append(take(path, wait=wait))
        if len(taken) == 1:
            path.rmdir()
        return taken[-1]

    monkeypatch.setattr(directory, "lock", lock_and_remove)
    with locked_directory(path, "busy"):
        assert path.is_dir()
        monkeypatch.undo()
        with pytest.raises(OutputError, match="busy"), locked_directory(path, "busy"):
            pytest.fail("entered")
    assert len(taken) == 2
