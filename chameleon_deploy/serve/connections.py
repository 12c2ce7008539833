"""The connections of a server: how many there are, how long they may be silent, and what they may send.

A client that sends nothing, or half a header, is closed after HEADER_SECONDS, or earlier where a new client needs its
place. asyncio's own loop of accepting knows no limit: where descriptors end, it tries thousands of times a second.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import socket
import ssl
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10  # from a connection, or the end of its last answer, to the end of the next request's header
FLUSH_SECONDS = 60  # for a client to read what is left of an answer
MAX_OVERHEAD = 2**16  # bytes of a request that are no body: header, trailer, and the sizes of the parts
OVERHEAD_PER_BYTE = 8  # of a body more, so that parts may be of one byte
MAX_PIPELINED = 16  # requests that a client sends before the answer to its first
RESERVED = 64  # descriptors that are not for connections
LOG_SECONDS = 60  # between two messages that there is no room
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """One client. It is idle unless a request whose header is complete has not been answered."""

    def __init__(self, connections: Connections, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._connections = connections
        self._opening = asyncio.current_task()  # in which it is made
        self._received = self._body_bytes = 0  # of the current request

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connections.end_opening(self._opening)  # before the task ends: a connection counts once
        self._connections.note(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.forget(self)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        overhead = self._received - self._body_bytes
        if overhead > MAX_OVERHEAD + OVERHEAD_PER_BYTE * self._body_bytes and not self.transport.is_closing():
            self.send_400_response("The header or the parts of the body are too large.")
        self._connections.note(self)

    def on_message_begin(self) -> None:
        self._received = self._body_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise ValueError("too many requests at once")  # the parser's caller answers 400 and closes

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._connections.note(self)


class Connections:
    """At most so many connections; those that wait to be accepted wait in the kernel."""

    def __init__(self, most: int) -> None:
        """most: less, if the process may not open so many descriptors; its soft limit is raised where that helps"""
        self.most = _allowed(most)
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # since when, the longest first
        self._opening: dict[asyncio.Task[Any], None] = {}  # whose TLS is not established, the longest first
        self._freed = asyncio.Event()
        self._logged = -math.inf

    def __len__(self) -> int:
        return len(self._open) + len(self._opening)

    async def accept(
        self, listening: socket.socket, make: Callable[[], Connection], context: ssl.SSLContext | None
    ) -> None:
        """Accept clients until it is cancelled."""
        loop = asyncio.get_running_loop()
        sweeping = loop.create_task(self._sweep())
        try:
            while True:
                try:
                    client, _ = await loop.sock_accept(listening)
                except OSError as error:  # of this client, or of this process
                    if error.errno in _EXHAUSTED:
                        self._tell(f"accepting a connection failed: {error.strerror}")
                        self._evict()
                        await asyncio.sleep(0.1)
                    continue
                await self._make_room()
                opening = loop.create_task(self._establish(client, make, context))
                self._opening[opening] = None
                opening.add_done_callback(self.end_opening)
        finally:
            sweeping.cancel()

    def note(self, connection: Connection) -> None:
        """Note whether a connection is idle."""
        self._open.add(connection)
        if connection.is_idle:
            self._idle.setdefault(connection, asyncio.get_running_loop().time())
        else:
            self._idle.pop(connection, None)

    def end_opening(self, task: asyncio.Task[Any] | None) -> None:
        """Note that a client's TLS is established, or never will be."""
        if task in self._opening:
            del self._opening[task]
            self._freed.set()

    def forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._freed.set()

    async def _establish(
        self, client: socket.socket, make: Callable[[], Connection], context: ssl.SSLContext | None
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                make, client, ssl=context, ssl_handshake_timeout=HEADER_SECONDS if context else None
            )
        except (OSError, asyncio.CancelledError):  # the client's fault, or its place was needed
            client.close()

    async def _make_room(self) -> None:
        while len(self) >= self.most:
            self._tell(f"{len(self)} connections are open, which is the limit: the longest silent ones are closed")
            self._freed.clear()
            self._evict()
            await self._freed.wait()

    def _evict(self) -> None:
        """Close the connection that has been idle the longest."""
        if self._idle:
            next(iter(self._idle)).transport.abort()
        elif self._opening:
            next(iter(self._opening)).cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(HEADER_SECONDS / 8)
            now = asyncio.get_running_loop().time()
            for connection, since in list(self._idle.items()):
                is_read = connection.transport.get_write_buffer_size() == 0
                if now - since > (HEADER_SECONDS if is_read else FLUSH_SECONDS):
                    connection.transport.abort()

    def _tell(self, message: str) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            _log.warning(message)


def _allowed(most: int) -> int:
    """Return how many connections the limit of descriptors allows, which is raised as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + RESERVED
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft - RESERVED))
