"""`benchmarks.chat_cost`: both kinds of requests ask for the same tokens, and a difference is no figure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks import chat_cost
from chameleon_deploy.errors import CheckFailedError
from chameleon_deploy.reference.checkpoint import Checkpoint
from tests.commands import call
from tests.serving import InThread, running
from tests.speaking_model import chat_source, speaking_bundle


@pytest.fixture(scope="module")
def speaking(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    path = tmp_path_factory.mktemp("speaking") / "bundle"
    speaking_bundle(["One.", "Two."], mini.trunk.tokenizer, path, chat_source())
    with running(path, mode="none") as server:
        yield server


def test_the_command(speaking: InThread) -> None:
    sizes = ["--rounds", 1, "--new-tokens", 3, "--threads", 1, "--capacity", 512]
    result = call("benchmarks.chat_cost", speaking.runtime.bundle.path, *sizes, "--server", f"same={speaking.url}")
    assert result.returncode == 0, result.stderr
    assert re.search(r"same\W+[\d.]+\W+[\d.]+\W+[\d.]+ \(", result.stdout), result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if " no " in line or " yes " in line]
    assert len(rows) == 4


def test_other_tokens_are_found(speaking: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = chat_cost._choice

    def other(client: httpx.Client, path: str, body: Any) -> dict[str, Any]:
        found = choice(client, path, body)
        return {**found, "token_ids": found["token_ids"][1:]} if path == chat_cost.COMPLETION else found

    with speaking.http() as client:
        assert len(chat_cost.bodies(client, 2)[chat_cost.CHAT]) == len(chat_cost.TOPICS)
        monkeypatch.setattr(chat_cost, "_choice", other)
        with pytest.raises(CheckFailedError, match="rivers"):
            chat_cost.bodies(client, 2)


def test_a_short_answer_of_another_server_is_found(speaking: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    post = httpx.Client.post

    def shorter(client: httpx.Client, url: str, json: dict[str, Any]) -> httpx.Response:
        return post(client, url, json={**json, "max_tokens": json["max_tokens"] - (client is other)})

    with speaking.http() as client, speaking.http() as other:
        chat_cost.beside(client, other, 1, 3)
        monkeypatch.setattr(httpx.Client, "post", shorter)
        with pytest.raises(CheckFailedError, match=r"answered \[2\] tokens, not 3"):
            chat_cost.beside(client, other, 1, 3)
