"""Tenants of API keys: their shares and limits over HTTP. How rows are divided is in tests/runtime/test_tenants.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime import Tenant
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.keys import Keys
from chameleon_deploy.serve.service import Service
from chameleon_deploy.serve.settings import Settings
from tests.serving import InThread, running

KEYS: dict[str, Any] = {
    "sk-a": {"tenant": "alice", "weight": 3, "limits": {"rows": 2, "tokens_per_minute": 60}},
    "sk-a2": "alice",
    "sk-b": {"tenant": "bob", "limits": {"max_waiting": 0, "rows": 1}},
}


def written(place: Path, keys: dict[str, Any]) -> Path:
    file = place / "keys.json"
    file.write_text(json.dumps(keys))
    return file


@pytest.fixture(scope="module")
def limited(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    keys = written(tmp_path_factory.mktemp("keys"), KEYS)
    with running(bundle, rows=2, prefill_tokens=16, api_keys=keys) as server:
        yield server


def ask(server: InThread, key: str, path: str = "completions", **body: Any) -> httpx.Response:
    fields = {"prompt": [7] * 10, "max_tokens": 4, "ignore_eos": True, "temperature": 0, "mode": "none", **body}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/{path}", json=fields, headers=headers, timeout=60)


def test_every_key_of_a_tenant_has_its_share(tmp_path: Path) -> None:
    keys = Keys(written(tmp_path, KEYS))
    shares = [keys.holder(f"Bearer {key}").share for key in KEYS]
    alice = Tenant("alice", 3, rows=2, tokens_per_minute=60)
    assert shares == [alice, alice, Tenant("bob", rows=1, max_waiting=0)]
    assert Keys(file=None).holder(authorization=None).share == Tenant()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sk-a2": {"tenant": "alice", "weight": 2}}, "differ"),
        ({"sk-a2": {"tenant": "alice", "limits": {"rows": 3}}}, "differ"),
        ({"sk-b": {"tenant": "bob", "weight": 0}}, "weight"),
        ({"sk-b": {"tenant": "bob", "limits": {"rows": 0}}}, "rows"),
        ({"sk-b": {"tenant": "bob", "limits": {"tokens": 5}}}, "tokens"),
        ({"sk-b": {"tenant": "bob", "weight": "many"}}, "weight"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        Keys(written(tmp_path, KEYS | changes))


def test_tokens_of_a_minute_are_all_that_a_tenants_keys_have(limited: InThread) -> None:
    """A request may use more than is left; whoever comes then is told when to come again."""
    assert ask(limited, "sk-a", max_tokens=100).status_code == 200
    refused = ask(limited, "sk-a2")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    assert 40 < int(refused.headers["Retry-After"]) <= 60
    assert ask(limited, "sk-b").status_code == 200


def test_a_tenants_rows_that_may_not_wait_are_refused(limited: InThread) -> None:
    refused = ask(limited, "sk-b", n=2)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert "bob" in refused.json()["error"]["message"]


def test_there_is_one_more_row_which_is_kept_for_a_newcomer(limited: InThread) -> None:
    assert limited.served.engine.rows == 3


def test_no_tenant_has_all_requests_that_are_worked_on(bundle: Path) -> None:
    service = Service(Settings(bundle, max_requests=8))
    for _ in range(4):
        service.begin("alice")
    with pytest.raises(ApiError):
        service.begin("alice")
    service.begin("bob")
    service.begin("bob")
    with pytest.raises(ApiError):
        service.begin("bob")
    for _ in range(2):
        service.end("alice")
    service.begin("bob")
    for _ in range(3):
        service.begin()
    with pytest.raises(ApiError):
        service.begin()
