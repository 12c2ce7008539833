"""Bodies of requests: read whole, within limits of bytes and time, and parsed. Without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from chameleon_deploy.serve import bodies
from chameleon_deploy.serve.bodies import DisconnectedError, UnfinishedBodies, parse, read_body
from chameleon_deploy.serve.errors import ApiError

SMALL = 2**16  # the bytes of each body that are not counted


class Body(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str
    n: int = 1
    logit_bias: dict[int, float] = {}


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def read(messages: Sequence[dict[str, Any]], max_bytes: int, unfinished: UnfinishedBodies) -> bytes:
    """Read a body that arrives in these messages; behind them nothing arrives."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return asyncio.run(read_body(receive, max_bytes, unfinished))


def left(unfinished: UnfinishedBodies) -> int:
    """Return the bytes that may still arrive."""
    low, high = 0, 2**30
    while low < high:
        middle = (low + high + 1) // 2
        try:
            unfinished.take(middle)
        except ApiError:
            high = middle - 1
        else:
            unfinished.give(middle)
            low = middle
    return low


def test_a_body_is_its_parts() -> None:
    unfinished = UnfinishedBodies(0)
    parts = [part(b"ab", True), {"type": "http.request", "more_body": True}, part(b"c", False)]
    assert read(parts, 3, unfinished) == b"abc"
    assert read([{"type": "http.request"}], 3, unfinished) == b""
    assert left(unfinished) == 0


def test_a_body_too_large_is_read_and_refused() -> None:
    with pytest.raises(ApiError, match="the body has 5 bytes, at most 3 are taken") as refused:
        read([part(b"ab", True), part(b"cd", True), part(b"e", False)], 3, UnfinishedBodies(0))
    assert (refused.value.status, refused.value.code) == (413, "body_too_large")


def test_what_arrives_of_large_bodies_is_limited_over_all() -> None:
    unfinished = UnfinishedBodies(10)
    large = [part(bytes(SMALL), True), part(bytes(4), True), part(bytes(6), False)]
    assert len(read(large, 2 * SMALL, unfinished)) == SMALL + 10
    unfinished.take(1)  # of another request
    with pytest.raises(ApiError, match="large bodies of other requests are arriving: try again later") as refused:
        read(large, 2 * SMALL, unfinished)
    assert (refused.value.status, refused.value.code) == (429, "too_many_bytes")
    assert left(unfinished) == 9  # a refused body takes no place
    assert len(read([part(bytes(SMALL + 9), False)], 2 * SMALL, unfinished)) == SMALL + 9
    with pytest.raises(ApiError, match="try again later"):
        read([part(bytes(SMALL + 10), False)], 2 * SMALL, unfinished)
    assert len(read([part(bytes(SMALL + 9), False)], 2 * SMALL, unfinished)) == SMALL + 9


def test_a_client_that_has_gone() -> None:
    unfinished = UnfinishedBodies(10)
    with pytest.raises(DisconnectedError):
        read([part(bytes(SMALL + 4), True), {"type": "http.disconnect"}], 2 * SMALL, unfinished)
    assert left(unfinished) == 10


def test_a_body_that_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "READ_SECONDS", 0.1)
    with pytest.raises(ApiError, match=r"the body did not arrive within 0\.1 seconds") as refused:
        read([part(b"a", True)], 3, UnfinishedBodies(0))
    assert (refused.value.status, refused.value.code) == (400, "body_incomplete")
    assert refused.value.__cause__ is None


def test_null_stands_for_a_field_that_is_left_out() -> None:
    assert parse(b'{"prompt": "a", "n": null}', Body) == Body("a")


def test_a_token_id_may_be_a_key() -> None:
    assert parse(b'{"prompt": "a", "logit_bias": {"50256": -100}}', Body).logit_bias == {50256: -100}


@pytest.mark.parametrize(
    ("raw", "message", "param"),
    [
        (b'{"prompt": 1}', "Expected `str`, got `int`", "prompt"),
        (b'{"prompt": null}', "missing required field `prompt`", "prompt"),
        (b'{"prompt": "a", "m": 1}', "unknown field `m`", None),
        (b"[]", "Expected `object`, got `array`", None),
        (b"null", "Expected `object`, got `null`", None),
        (b"{", "Input data was truncated", None),
        (b'{"prompt": "\xff"}', "Invalid UTF-8 encoded string", None),
        (b"[" * 100_000, "maximum recursion depth exceeded", None),
    ],
)
def test_a_body_that_is_not_valid(raw: bytes, message: str, param: str | None) -> None:
    with pytest.raises(ApiError, match=f"the body is not valid: .*{message}") as refused:
        parse(raw, Body)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "input_invalid", param)
