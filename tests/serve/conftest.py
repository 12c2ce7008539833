"""Servers that tests share which do them no harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest

from tests.serving import InThread, running

if TYPE_CHECKING:
    from tests.ray_cluster import Cluster


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[InThread]:
    with running(bundle, rows=4, prefill_tokens=16) as found:
        yield found


@pytest.fixture(scope="session")
def client(server: InThread) -> openai.OpenAI:
    return server.openai()


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of three processors, on which a test deploys what it needs."""
    from tests.ray_cluster import cluster

    with cluster(tmp_path_factory.mktemp("ray"), (3, 3)) as found:
        yield found
