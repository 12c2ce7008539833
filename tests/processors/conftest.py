"""These tests need no PyTorch where CHAMELEON_RECORD names a directory that tests/processors/record.py wrote.

`.ci/processors` runs them on emulated processors, without the conftest.py of the folder above, which imports PyTorch.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cpp.c_interface import LIBRARY
from tests.processors.record import Reference, record

collect_ignore = [] if LIBRARY.exists() or "CHAMELEON_BUILD" in os.environ else ["test_cpp_library.py"]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("CHAMELEON_RECORD"):
        return Path(given)
    directory = tmp_path_factory.mktemp("processors")
    record(directory)
    return directory


@pytest.fixture(scope="session")
def reference(recorded: Path) -> Reference:
    return Reference.read(recorded)
