"""One engine of a cluster: the server of one machine, called over Ray instead of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from dataclasses import replace
from typing import Any, NamedTuple

from ray import serve

from chameleon_deploy.errors import RequestError
from chameleon_deploy.serve.app import build
from chameleon_deploy.serve.service import Service
from chameleon_deploy.serve.settings import Settings
from chameleon_deploy.store import remote

Message = MutableMapping[str, Any]  # of ASGI


class Head(NamedTuple):
    """The beginning of an answer. A replica that dies before it can give the first bytes has not begun.

    more  whether the body goes on
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    more: bool


class Replica:
    """Ray Serve's deployment class of an engine."""

    def __init__(self, bundle: str, settings: Settings) -> None:
        """Load a bundle, from this node's local cache where it is a URL. Raises a ChameleonError."""
        self._service = Service(replace(settings, bundle=remote.local(bundle)), has_peers=True)
        self._service.open()
        self._app = build(self._service)

    async def answer(self, scope: dict[str, Any], body: bytes, key: str | None) -> AsyncGenerator[Head | bytes, None]:
        """Yield what the application answers to one request: a Head, then the rest of the body as it comes.

        scope  of ASGI
        key    for the router, which has used it

        Closing or cancelling the generator is the client's disconnect.
        """
        sent = asyncio.Queue[Message | None]()
        task = asyncio.create_task(self._run(scope, body, sent))
        try:
            start, first = await _next(sent), await _next(sent)
            more = first.get("more_body", False)
            yield Head(start["status"], list(start["headers"]), first.get("body", b""), more)
            while more:
                message = await _next(sent)
                part, more = message.get("body", b""), message.get("more_body", False)
                while more and not sent.empty():  # what has come meanwhile goes along
                    message = await _next(sent)
                    part, more = part + message.get("body", b""), message.get("more_body", False)
                yield part
        finally:
            task.cancel()

    async def _run(self, scope: dict[str, Any], body: bytes, sent: asyncio.Queue[Message | None]) -> None:
        received = asyncio.Queue[Message]()
        received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        try:
            await self._app(scope, received.get, sent.put)
        finally:
            sent.put_nowait(None)

    def metrics(self) -> tuple[str, bytes]:
        """Return the replica's name, and its metrics in Prometheus' text format."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.text()

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises: one whose engine has stopped or whose bundle changed."""
        self._service.check_health()

    def __del__(self) -> None:
        """Called by Ray after the requests have ended."""
        service: Service | None = getattr(self, "_service", None)
        if service is not None:
            service.abort()


async def _next(sent: asyncio.Queue[Message | None]) -> Message:
    message = await sent.get()
    if message is None:
        raise RequestError("the application ended in the middle of an answer: see the replica's log")
    return message
