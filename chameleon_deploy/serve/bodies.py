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


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError for one that is too large or too slow, DisconnectedError."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise DisconnectedError
                size += len(message.get("body", b""))
                if size <= max_bytes:  # the rest is read too, since a client that still sends sees no answer
                    body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(400, "body_incomplete", f"the body did not arrive within {READ_SECONDS} seconds") from None
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
