"""Server-sent events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from chameleon_deploy.serve.errors import api_error

DONE = b"data: [DONE]\n\n"


def event(body: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def events(chunks: AsyncGenerator[msgspec.Struct, None]) -> AsyncGenerator[bytes, None]:
    """Write a stream; an error in the middle is an event, after which it ends."""
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield event(chunk)
        yield DONE
    except Exception as error:
        yield event(api_error(error).body)


class EventStream(StreamingResponse):
    """A stream of events. Whoever makes them watches for the client's disconnect, not this."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await self.stream_response(send)
