"""The file of API keys, and who sends an Authorization header. Without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.engine.tenants import NOBODY, Tenant
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.keys import RIGHTS, Holder, Keys


def keys(at: Path, content: dict[str, Any]) -> Keys:
    file = at / "keys.json"
    file.write_text(json.dumps(content))
    return Keys(file)


def test_without_a_file_everybody_may_call() -> None:
    everybody = Keys(None)
    assert not everybody
    assert everybody.holder(None) == everybody.holder("Bearer sk-a") == Holder(None, RIGHTS, NOBODY)


def test_a_key_gives_a_tenant_and_its_rights(tmp_path: Path) -> None:
    found = keys(tmp_path, {"sk-a": "a", "sk-b": {"tenant": "b", "rights": ["load_adapters"]}})
    assert found
    assert found.holder("Bearer sk-a") == Holder("a", frozenset(), Tenant("a"))
    assert found.holder("bearer  sk-b ") == Holder("b", RIGHTS, Tenant("b"))


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer sk-c", "Basic sk-a", "sk-a", "Bearer sk-a\udcff"]
)
def test_who_has_no_key_may_not_call(tmp_path: Path, authorization: str | None) -> None:
    with pytest.raises(ApiError, match="pass a valid API key: Authorization: Bearer KEY") as refused:
        keys(tmp_path, {"sk-a": "a"}).holder(authorization)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_the_keys_of_a_tenant_share_its_weight_and_limits(tmp_path: Path) -> None:
    limits = {"rows": 2, "max_waiting": 0, "tokens_per_minute": 100}
    content = {"sk-1": {"tenant": "a", "weight": 3, "limits": limits}, "sk-2": {"tenant": "a", "limits": limits},
               "sk-3": "a", "sk-4": {"tenant": "b", "weight": 2}}  # fmt: skip
    found = keys(tmp_path, content)
    of_a = Tenant("a", weight=3, rows=2, max_waiting=0, tokens_per_minute=100)
    assert [found.holder(f"Bearer sk-{i}").share for i in (1, 2, 3, 4)] == [of_a] * 3 + [Tenant("b", weight=2)]


@pytest.mark.parametrize("other", [{"weight": 2}, {"limits": {"rows": 2}}])
def test_keys_of_a_tenant_that_differ_are_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    one = {"tenant": "a", "weight": 1, "limits": {"rows": 1}}
    with pytest.raises(InputError, match=r"keys\.json: the keys of tenant 'a' differ in its weight or limits"):
        keys(tmp_path, {"sk-1": one, "sk-2": one | other})


def test_limits_out_of_range_name_the_tenant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"keys\.json: tenant 'a': weight"):
        keys(tmp_path, {"sk-1": {"tenant": "a", "weight": 0}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "expected a JSON object") for content in (
            b"", b"[]", b'{"a": 3}', b"\xff", b'{"a": {"rights": []}}', b'{"a": {"tenant": "a", "rights": ["all"]}}',
            b'{"a": {"tenant": "a", "right": []}}')),
        *((content, "needs at least one key, and no empty tenant") for content in (
            b"{}", b'{"a": ""}', b'{"a": {"tenant": ""}}')),
        *((content, "key 2 must be of printable ASCII characters without blanks") for content in (
            '{"b": "a", "\xe9": "a"}'.encode(), b'{"b": "a", " a": "a"}', b'{"b": "a", "a b": "a"}',
            b'{"b": "a", "": "a"}')),
    ],
)  # fmt: skip
def test_a_bad_file_of_keys(tmp_path: Path, content: bytes, message: str) -> None:
    (file := tmp_path / "keys.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"keys\.json.*{message}"):
        Keys(file)


def test_a_file_of_keys_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.json: No such file or directory"):
        Keys(tmp_path / "none.json")
