"""What requests have in common: keys that the replicas' own clusters and tenants agree with."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

import chameleon_deploy
from chameleon_deploy.errors import InputError
from chameleon_deploy.serve.affinity import Affinity

PREFIX = "You are a helpful assistant. " * 30
SYSTEM = {"role": "system", "content": PREFIX}


def _key(affinity: Affinity, body: bytes, authorization: str = "") -> str | None:
    headers = [(b"authorization", authorization.encode())]
    return asyncio.run(affinity.key(Request({"type": "http", "method": "POST", "headers": headers}), body))


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_the_cluster_of_the_first_prompt(bundle: Path, field: str) -> None:
    runtime, affinity = chameleon_deploy.load(bundle, threads=1), Affinity("cluster", str(bundle), None)
    for text in ("The river", "def main():", "1234 5678"):
        ids = runtime.encode([text])[0]
        bodies: list[Any] = [text, [text, "another"], ids, [ids]]
        keys = {_key(affinity, json.dumps({field: body}).encode()) for body in bodies}
        assert keys == {str(runtime.embed([ids])[1][0])}
        start = json.dumps({field: text, "adapt_tokens": 1}).encode()
        assert _key(affinity, start) == str(runtime.embed([ids[:1]])[1][0])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"prompt": []}', b'{"prompt": [[-1]]}', b'{"prompt": 5}']
)
def test_what_a_replica_will_refuse_has_no_key(bundle: Path, body: bytes) -> None:
    assert _key(Affinity("cluster", str(bundle), None), body) is None


def test_a_routing_without_keys_is_refused(bundle: Path, lora_bundle: Path) -> None:
    with pytest.raises(InputError, match="api_keys"):
        Affinity("tenant", str(bundle), None)
    with pytest.raises(InputError, match="cluster"):
        Affinity("cluster", str(lora_bundle), None)


def test_the_tenant_of_the_api_key(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text('{"sk-1": "acme", "sk-2": "acme", "sk-3": "other"}')
    affinity = Affinity("tenant", str(bundle), file)
    assert [_key(affinity, b"", f"Bearer sk-{i}") for i in (1, 2, 3, 4)] == ["acme", "acme", "other", None]
    assert _key(Affinity("load", str(bundle), file), b"", "Bearer sk-1") is None


def test_the_beginning_of_the_text(bundle: Path, tmp_path: Path) -> None:
    """Equal for texts that begin alike and for every turn of a conversation; never of two tenants or salts."""
    file = tmp_path / "keys.json"
    file.write_text('{"sk-1": "acme", "sk-2": "other"}')
    alone, of_tenants = Affinity("prefix", str(bundle), None), Affinity("prefix", str(bundle), file)

    def key(body: Any, affinity: Affinity = alone, authorization: str = "") -> str | None:
        return _key(affinity, json.dumps(body).encode(), authorization)

    first = {"role": "user", "content": "What is a river?"}
    alike: list[list[Any]] = [
        [{"prompt": PREFIX + "one"}, {"prompt": [PREFIX + "two", "x"], "model": "wiki:legal"}],
        [{"prompt": [list(range(600))]}, {"prompt": list(range(700))}],
        [{"messages": [SYSTEM, first]}, {"messages": [SYSTEM, {"role": "user", "content": "else"}]}],
        [{"messages": [first]}, {"messages": [first, {"role": "assistant", "content": "Water."}, first]}],
        [{"input": "a", "instructions": PREFIX}, {"input": "b", "instructions": PREFIX}],
        [{"input": [first]}, {"input": [first, first]}],
    ]
    keys = [{key(body) for body in bodies} for bodies in alike]
    assert all(len(found) == 1 and None not in found for found in keys)
    assert len(set.union(*keys)) == len(alike)
    body = {"prompt": PREFIX}
    assert key(body) != key({**body, "cache_salt": "mine"})
    assert len({key(body, of_tenants, f"Bearer sk-{i}") for i in (1, 2)} | {None}) == 3
    assert key(body, of_tenants) is None
    for wrong in list[Any]([{"prompt": []}, {}, {"messages": 5}, {"prompt": {}}, []]):
        assert key(wrong) is None
    assert _key(alone, b"\xff") is None
