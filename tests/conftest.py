"""Real checkpoints and real bundles, made once per run."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# Before PyTorch reads it, and for the processes that tests start: there is a worker per core, and threads that spin
# while another worker has their core took four times the processor time, and up to twenty times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import Precision, open_bundle
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig, build_factors, load_checkpoint
from chameleon_deploy.reference.hypernetwork import StaticLoRA
from chameleon_deploy.reference.model import trunk_from
from chameleon_deploy.reference.random import random_checkpoint
from tests.devices import on_cpu
from tests.made_once import made_once

REPOSITORY = Path(__file__).parent.parent
Exported = Callable[[str, Precision], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take minutes, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.path.name != "test_gpt2_small.py")


def nearly(value: Any) -> Any:
    """Equal to the digits that anyone prints: a matrix product's last bits depend on where its memory is."""
    if isinstance(value, dict):
        return {key: nearly(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nearly(item) for item in value]
    return pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value


@pytest.fixture(scope="session")
def mini_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights: 2 layers, hidden 64, vocabulary 512, 128 positions, 4 clusters."""
    made = made_once(tmp_path_factory, "mini", lambda path: random_checkpoint(path / "chameleon", "mini"))
    return made / "chameleon"


@pytest.fixture(scope="session")
def mini(mini_path: Path) -> Checkpoint:
    return load_checkpoint(mini_path)


@pytest.fixture(scope="session")
def mini_lora(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    made = made_once(tmp_path_factory, "mini_lora", lambda path: random_checkpoint(path / "lora", "mini", "lora"))
    path = made / "lora"
    checkpoint = load_checkpoint(path)
    assert isinstance(checkpoint.factors, StaticLoRA)
    checkpoint.factors.lora_B[0].data *= 30  # as far from the base as a trained one
    return checkpoint


def checkpoint_around(config: Any, num_clusters: int = 2) -> Checkpoint:
    """A checkpoint of random weights in memory, for a base of any configuration; its tokenizer is empty."""
    torch.manual_seed(0)
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trunk = trunk_from(transformers.AutoModelForCausalLM.from_config(config), tokenizer)
    about = CheckpointConfig(regime="chameleon", base_model=".", rank=2, hidden_sizes=(8, 4), num_clusters=num_clusters)
    factors = build_factors(about, trunk).eval().requires_grad_(False)
    centroids = torch.nn.functional.normalize(torch.randn(num_clusters, config.hidden_size), dim=1)
    return Checkpoint(about, trunk, factors, centroids, "0" * 64)


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same around a Llama: 4 query heads on 2 key-value heads, a head of its own."""
    made = made_once(tmp_path_factory, "llama", lambda path: random_checkpoint(path / "chameleon", "llama-mini"))
    return made / "chameleon"


@pytest.fixture(scope="session")
def llama(llama_path: Path) -> Checkpoint:
    return load_checkpoint(llama_path)


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    """The trained checkpoint of the demo."""
    return load_checkpoint(REPOSITORY / "models" / "tiny" / "chameleon")


@pytest.fixture(scope="session")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return the bundle of one of these checkpoints, by its fixture's name, in a precision. Not to be changed."""

    @cache
    def made(checkpoint: str, precision: Precision) -> Path:
        source = request.getfixturevalue(checkpoint)

        def export(directory: Path) -> None:
            export_bundle(source, directory / checkpoint, precision=precision)

        return made_once(tmp_path_factory, f"{checkpoint}-{precision}", export) / checkpoint

    return made


@pytest.fixture(scope="session")
def llama_bundle(exported: Exported) -> Path:
    return exported("llama", "fp32")


@pytest.fixture(scope="session")
def bundle(exported: Exported) -> Path:
    return exported("mini", "fp32")


@pytest.fixture(scope="session")
def lora_bundle(exported: Exported) -> Path:
    return exported("mini_lora", "fp32")


@pytest.fixture(scope="session")
def runtime(bundle: Path) -> Runtime:
    return chameleon_deploy.load(bundle, threads=1)


@pytest.fixture(scope="session")
def int8_runtime(exported: Exported) -> Runtime:
    return chameleon_deploy.load(exported("mini", "int8"), threads=1)


@pytest.fixture(scope="session")
def portable(bundle: Path) -> Runtime:
    """The same bundle on the graph that every provider runs."""
    return on_cpu(open_bundle(bundle), "decoder")


@pytest.fixture(scope="session")
def lora_runtime(lora_bundle: Path) -> Runtime:
    return chameleon_deploy.load(lora_bundle, threads=1)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A private copy of a directory, to be damaged."""
    import shutil

    def copy(path: Path) -> Path:
        target = tmp_path / f"copy_of_{path.name}"
        shutil.copytree(path, target, symlinks=True)
        return target

    return copy
