"""These tests drive the C++ library and are collected where it has been built: `make cpp` builds it and runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from chameleon_deploy.contract.bundle import LM_HEAD, Precision, TrainedRegime
from tests.cpp.c_interface import LIBRARY
from tests.made_once import made_once

collect_ignore_glob = [] if LIBRARY.exists() else ["test_*.py"]


@pytest.fixture(scope="session")
def mini_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random two-layer models: a GPT-2 in both regimes, and a Llama, in float32 and in int8; "given" take vectors,
    and every layer of "updated" is updated.
    """
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.random import random_checkpoint

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

    def make(directory: Path) -> None:
        for name, (size, regime, precision, conditioning_size) in kinds.items():
            checkpoint = directory / f"checkpoint-{name}"
            targets = ["all"] if name == "updated" else [LM_HEAD]
            random_checkpoint(checkpoint, size, regime, targets=targets, conditioning_size=conditioning_size)
            export_bundle(load_checkpoint(checkpoint), directory / name, precision=precision)

    directory = made_once(tmp_path_factory, "mini_bundles", make)
    return {name: directory / name for name in kinds}
