"""A loaded runtime notices that its bundle's files are not those that it was loaded from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import chameleon_deploy
from chameleon_deploy.errors import BundleChangedError


def _edit(file: Path) -> None:
    """One byte, as `rsync --inplace` writes it."""
    with file.open("r+b") as opened:
        opened.seek(100)
        opened.write(b"\x55")
    os.utime(file)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _replace(file: Path) -> None:
    copy = file.with_name("copy")
    shutil.copy2(file, copy)  # the same size and modification time
    copy.rename(file)


def _remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("file", ["bundle.json", "weights.bin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit, "changed in place"),
        (_truncate, "changed in place"),
        (_replace, "was replaced"),
        (_remove, "No such file"),
    ],
)
def test_a_changed_file_is_noticed(
    bundle: Path, copy_of: Callable[[Path], Path], file: str, change: Callable[[Path], None], message: str
) -> None:
    path = copy_of(bundle)
    runtime = chameleon_deploy.load(path, threads=1)
    runtime.check_unchanged()
    change(path / file)
    with pytest.raises(BundleChangedError, match=message) as raised:
        runtime.check_unchanged()
    assert raised.value.code == "bundle_changed"


def test_a_bundle_that_is_read_stays_unchanged(bundle: Path) -> None:
    runtime = chameleon_deploy.load(bundle, threads=1)
    runtime.generate(["x"], max_new_tokens=2)
    runtime.check_unchanged()
