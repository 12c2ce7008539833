"""These tests drive the C++ library and are collected where it has been built: `make cpp` builds it and runs them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from chameleon_deploy.contract.bundle import LM_HEAD, Precision, TrainedRegime
from tests.cpp.c_interface import LIBRARY

collect_ignore_glob = [] if LIBRARY.exists() else ["test_*.py"]


@pytest.fixture(scope="session")
def mini_bundles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Random two-layer models: a GPT-2 in both regimes, and a Llama, in float32 and in int8; "given" take vectors,
    and every layer of "updated" is updated.
    """
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.random import random_checkpoint

    directory = tmp_path_factory.mktemp("mini")
    bundles = {}
    kinds: dict[str, tuple[str, TrainedRegime, Precision, int]] = {
        "chameleon": ("mini", "chameleon", "fp32", 0),
        "lora": ("mini", "lora", "fp32", 0),
        "llama": ("llama-mini", "chameleon", "fp32", 0),
        "int8": ("mini", "chameleon", "int8", 0),
        "llama-int8": ("llama-mini", "lora", "int8", 0),
        "int4": ("llama-mini", "chameleon", "int4", 0),
        "given": ("mini", "chameleon", "fp32", 24),
        "given-int8": ("llama-mini", "chameleon", "int8", 24),
        "updated": ("llama-mini", "chameleon", "fp32", 0),
    }
    for name, (size, regime, precision, conditioning_size) in kinds.items():
        checkpoint, bundles[name] = directory / f"checkpoint-{name}", directory / name
        targets = ["all"] if name == "updated" else [LM_HEAD]
        random_checkpoint(checkpoint, size, regime, targets=targets, conditioning_size=conditioning_size)
        export_bundle(load_checkpoint(checkpoint), bundles[name], precision=precision)
    yield bundles
    shutil.rmtree(directory)
