"""A server that tests share which do it no harm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serving import Running, running


@pytest.fixture(scope="session")
def server(bundle: Path) -> Iterator[Running]:
    with running(bundle, rows=4, prefill_tokens=16) as found:
        yield found


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return server.openai()
