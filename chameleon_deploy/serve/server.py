"""uvicorn around the application: it answers /health while the bundle loads and while requests drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import uvicorn

from chameleon_deploy.errors import InputError
from chameleon_deploy.serve.app import build
from chameleon_deploy.serve.connections import Connection, Connections
from chameleon_deploy.serve.service import Service

_log = logging.getLogger(__name__)

FLUSH_SECONDS = 5  # for answers that are on their way when all requests have ended


class Server(uvicorn.Server):
    """Loads the bundle after it has begun to listen, and drains at the first signal to end."""

    def __init__(self, service: Service, host: str, port: int, **options: Any) -> None:
        """Listen on an address; port 0 takes a free one. options: of uvicorn.Config

        Raises InputError for an address that cannot be had.
        """
        self._socket = listen(host, port)
        config = uvicorn.Config(
            build(service, self._lifespan),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=FLUSH_SECONDS,
            **options,
        )
        super().__init__(config)
        self._service, self._failure = service, list[BaseException]()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        port: int = self._socket.getsockname()[1]
        return port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        connections = Connections(self._service.settings.max_connections)
        self._service.metrics.count_connections(connections)

        def make() -> Connection:
            return Connection(
                connections, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )  # fmt: skip

        self._accepting = asyncio.create_task(connections.accept(self._socket, make, self.config.ssl))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        await super().shutdown(sockets=[self._socket])

    def serve_until_ended(self) -> None:
        """Run until a signal. Raises what loading the bundle raised."""
        self.run()
        if self._failure:
            raise self._failure[0]

    def stop(self) -> None:
        """Drain, then end. Safe to call from any thread; does nothing before the start and after the end."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_drain)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self.should_exit = True
        elif self._drain_task is None:
            self.stop()
        else:  # the second signal does not wait
            self.should_exit = self.force_exit = True
            self._loop.call_soon_threadsafe(self._loop.run_in_executor, None, self._service.abort)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        scheme = "https" if self.config.is_ssl else "http"
        _log.info("listening on %s://%s:%s", scheme, self._socket.getsockname()[0], self.port)
        loading = asyncio.create_task(self._load())
        yield
        await loading
        await asyncio.to_thread(self._service.drain)

    async def _load(self) -> None:
        try:
            await asyncio.to_thread(self._service.open)
        except Exception as error:
            self._failure.append(error)
            self.should_exit = True

    def _begin_drain(self) -> None:
        if self._drain_task is None:
            self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await asyncio.to_thread(self._service.drain)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, whose connections send without delay.

    Raises InputError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    # Connections inherit it. asyncio sets it only on sockets that name their protocol, and without it the second part
    # of an answer waits 40 ms for the client's acknowledgement of the first.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listening.setblocking(False)
    return listening
