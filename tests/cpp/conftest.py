"""These tests drive the C++ library and are collected where it has been built: `make cpp` builds it and runs them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cpp.c_interface import LIBRARY

collect_ignore_glob = [] if LIBRARY.exists() else ["test_*.py"]


@pytest.fixture(scope="session")
def mini_bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Random two-layer models of both regimes."""
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.random import random_checkpoint

    directory = tmp_path_factory.mktemp("mini")
    bundles = {}
    for regime in ("chameleon", "lora"):
        checkpoint, bundles[regime] = directory / f"checkpoint-{regime}", directory / regime
        random_checkpoint(checkpoint, "mini", regime)
        export_bundle(load_checkpoint(checkpoint), bundles[regime], None)
    yield bundles
    shutil.rmtree(directory)
