"""What all endpoints have in common: the API key, the limits, the body, the answer."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Coroutine
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chameleon_deploy.serve.bodies import DisconnectedError, parse, read_body
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.keys import Holder
from chameleon_deploy.serve.operations import Operation
from chameleon_deploy.serve.responses import ResponsesRequest
from chameleon_deploy.serve.schemas import AdaptedRequest
from chameleon_deploy.serve.service import Service

SEND_SECONDS = 60  # for a client to read one part of an answer


class Endpoint:
    """One operation as an ASGI application."""

    def __init__(self, service: Service, operation: Operation) -> None:
        self._service, self._operation = service, operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        holder = service.keys.holder(_header(scope, b"authorization"))
        service.check_bundle()
        try:
            raw = await read_body(receive, service.settings.max_body_bytes, service.unfinished_bodies)
        except DisconnectedError:
            return
        service.begin(holder.tenant)
        try:
            await _while_connected(receive, self._answer(raw, holder, scope, receive, send))
        except asyncio.CancelledError:
            if not service.ended:
                raise
            raise ApiError(503, "closed", "the server ended before it had answered") from None
        finally:
            service.end(holder.tenant)

    async def _answer(self, raw: bytes, holder: Holder, scope: Scope, receive: Receive, send: Send) -> None:
        operation = self._operation
        body = parse(raw, operation.body) if operation.body else None
        if self._service.settings.log_prompts:
            scope["state"]["body"] = raw.decode(errors="replace")
        request_id = scope["state"]["request_id"]
        call = Call(body, len(raw), self._service.served, holder.tenant, holder.rights, request_id, holder.share)
        try:
            if isinstance(body, AdaptedRequest | ResponsesRequest):
                await _load_named(call)
            answer = await operation.handler(call)
            response = answer if isinstance(answer, Response) else json_response(answer)
            await _deliver(response, scope, receive, send)
        finally:
            scope["state"]["rows"] = [row for stream in call.streams for row in stream.finished]


async def _load_named(call: Call[Any]) -> None:
    """Load the adapters that a request names, where the server and its key let it. Raises ApiError."""
    directories = call.served.adapter_directories
    if directories is None or not directories.resolves or "load_adapters" not in call.rights:
        return
    choices = call.body.adapters if isinstance(call.body, AdaptedRequest) else None
    if names := call.served.models.unknown(call.body.model, choices):
        await directories.resolve(names)


def json_response(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do some work; it is cancelled when its client leaves."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        has_left = leaving.done()
        leaving.cancel()
        working.cancel()  # nothing where it has ended
        await asyncio.wait((working,))
    if not (working.cancelled() and has_left):
        working.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _deliver(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send a response; one that nobody reads is given up, and with it what makes it."""
    loop, began = asyncio.get_running_loop(), math.inf  # when the sending of the current part began
    timer: asyncio.TimerHandle

    async def timed(message: Message) -> None:
        nonlocal began
        began = loop.time()
        await send(message)
        began = math.inf

    def check() -> None:
        nonlocal timer
        if loop.time() - began > SEND_SECONDS:
            limit.reschedule(loop.time())
        timer = loop.call_later(SEND_SECONDS / 8, check)

    # One timer for the whole response: a timeout around every part would cost 9 microseconds each.
    timer = loop.call_later(SEND_SECONDS / 8, check)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await response(scope, receive, timed)
    finally:
        timer.cancel()


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
