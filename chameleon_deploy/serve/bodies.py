"""Reading and checking the body of a request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

import msgspec

from chameleon_deploy.serve.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

READ_SECONDS = 30  # for a whole body


class DisconnectedError(Exception):
    """The client has gone before its request was complete: nobody reads an answer."""


class UnfinishedBodies:
    """The bytes of bodies that have not arrived whole, over all connections.

    The first SMALL bytes of each are not counted, so that small requests are taken while large ones fill what is
    allowed.
    """

    SMALL = 2**16

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """Count bytes, which `give` must follow. Raises ApiError where there are too many."""
        if size > self._left:
            raise ApiError(429, "too_many_bytes", "large bodies of other requests are arriving: try again later")
        self._left -= size

    def give(self, size: int) -> None:
        self._left += size


async def read_body(receive: Receive, max_bytes: int, unfinished: UnfinishedBodies) -> bytes:
    """The whole body. Raises ApiError for one that is too large or too slow, DisconnectedError."""
    body, size, counted = bytearray(), 0, 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise DisconnectedError
                size += len(message.get("body", b""))
                if size <= max_bytes:  # the rest is read too, since a client that still sends sees no answer
                    more_bytes = max(0, size - UnfinishedBodies.SMALL) - counted
                    unfinished.take(more_bytes)
                    counted += more_bytes
                    body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(400, "body_incomplete", f"the body did not arrive within {READ_SECONDS} seconds") from None
    finally:
        unfinished.give(counted)
    if size > max_bytes:
        raise ApiError(413, "body_too_large", f"the body has {size} bytes, at most {max_bytes} are taken")
    return bytes(body)


def parse(raw: bytes, type_: type[T]) -> T:
    """A JSON object as a struct; null means that a field is left out. Raises ApiError."""
    try:
        fields = msgspec.json.decode(raw)
        if isinstance(fields, dict):
            fields = {name: value for name, value in fields.items() if value is not None}
        return msgspec.convert(fields, type_, str_keys=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        at = _FIELD.search(str(error))
        raise ApiError(400, "input_invalid", f"the body is not valid: {error}", at and (at[1] or at[2])) from None


_FIELD = re.compile(r"\$\.(\w+)|required field `(\w+)`")
