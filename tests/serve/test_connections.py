"""Which connections are closed: for others, for silence, for what they send; and what that costs. Without a server."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from chameleon_deploy.serve import connections
from chameleon_deploy.serve.connections import RESERVED, Connection, Connections, _allowed

UNLIMITED = resource.RLIM_INFINITY
CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


class Client:
    """A connection, and its transport, with some bytes that its client has not read."""

    def __init__(self, is_idle: bool = True, unread: int = 0) -> None:
        self.is_idle, self.unread, self.closed_at, self.transport = is_idle, unread, -1.0, self

    def abort(self) -> None:
        if self.closed_at < 0:
            self.closed_at = asyncio.get_running_loop().time()

    def get_write_buffer_size(self) -> int:
        return self.unread


@pytest.mark.parametrize(
    ("soft", "hard", "most", "allowed", "raised"),
    [
        (UNLIMITED, UNLIMITED, 1000, 1000, None),
        (4096, 4096, 1000, 1000, None),
        (1000 + RESERVED, 4096, 1000, 1000, None),
        (999 + RESERVED, 4096, 1000, 1000, 1000 + RESERVED),
        (120, UNLIMITED, 1000, 1000, 1000 + RESERVED),
        (120, 500, 1000, 500 - RESERVED, 500),
        (60, 60, 1000, 1, 60),
    ],
)
def test_the_limit_of_descriptors_is_raised_or_obeyed(
    soft: int, hard: int, most: int, allowed: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", {resource.RLIMIT_NOFILE: (soft, hard)}.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert _allowed(most) == allowed
    assert limits == ([] if raised is None else [(raised, hard)])


def run(*clients: Client, seconds: float, while_open: Any = None) -> Connections:
    """Hold connections open for some time under the eyes of the sweep."""

    async def sweep() -> Connections:
        found = Connections(10)
        for client in clients:
            found.note(client)  # type: ignore[arg-type]
        sweeping = asyncio.create_task(found._sweep())
        started = asyncio.get_running_loop().time()
        if while_open:
            while_open(found)
        await asyncio.sleep(seconds)
        sweeping.cancel()
        for client in clients:
            client.closed_at -= started
        return found

    return asyncio.run(sweep())


def test_silent_clients_are_closed_and_those_that_still_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(connections, "FLUSH_SECONDS", 0.5)
    silent, reading, asking = Client(), Client(unread=1), Client(is_idle=False)
    run(silent, reading, asking, seconds=0.8)
    assert 0.2 < silent.closed_at <= reading.closed_at and reading.closed_at > 0.5
    assert asking.closed_at < 0


def test_a_client_that_asks_again_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.4)
    client = Client()

    def again(found: Connections) -> None:
        client.is_idle = False
        found.note(client)  # type: ignore[arg-type]

    run(client, seconds=0.8, while_open=again)
    assert client.closed_at < 0


def test_the_longest_idle_connection_makes_room_then_the_longest_opening() -> None:
    async def evict() -> None:
        found, first, second = Connections(10), Client(), Client()
        opening = [asyncio.create_task(asyncio.sleep(60)) for _ in range(2)]
        found._opening |= dict.fromkeys(opening)
        for client in (first, second, first):  # noted again, it has been idle for as long
            found.note(client)  # type: ignore[arg-type]
        assert len(found) == 4
        found._evict()
        assert (first.closed_at > 0, second.closed_at) == (True, -1)
        found.forget(first)  # type: ignore[arg-type]
        assert len(found) == 3 and found._freed.is_set()
        found.forget(second)  # type: ignore[arg-type]
        found._freed.clear()
        found._evict()
        await asyncio.sleep(0)
        assert [task.cancelled() for task in opening] == [True, False]
        found.end_opening(None)
        assert not found._freed.is_set()
        found.end_opening(opening[0])
        assert len(found) == 1 and found._freed.is_set()
        found.end_opening(opening[1])
        found._evict()  # nobody is left

    asyncio.run(evict())


def test_a_full_server_says_so_once_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def tell() -> None:
        found = Connections(1)
        now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        for now in (0.5, 1.0, 60.5, 60.6, 61.0):
            found._tell(f"full at {now}")

    with caplog.at_level(logging.WARNING):
        asyncio.run(tell())
    assert [record.message for record in caplog.records] == ["full at 0.5", "full at 60.6"]


def test_room_is_made_before_another_client_is_let_in(caplog: pytest.LogCaptureFixture) -> None:
    async def make_room() -> list[bool]:
        found, client = Connections(2), Client()
        found.note(client)  # type: ignore[arg-type]
        found._freed.set()  # by one that ended before
        await asyncio.wait_for(found._make_room(), 1)  # of two places one is free
        assert not caplog.records and client.closed_at < 0
        found.note(other := Client())  # type: ignore[arg-type]
        waiting = asyncio.create_task(found._make_room())
        await asyncio.sleep(0.01)
        before = waiting.done()
        found.forget(client)  # type: ignore[arg-type]
        await asyncio.wait_for(waiting, 1)
        return [before, client.closed_at > 0, other.closed_at > 0]

    assert asyncio.run(make_room()) == [False, True, False]
    assert caplog.messages == ["2 connections are open, which is the limit: the longest silent ones are closed"]


class Transport(asyncio.Transport):
    """Of a connection that is fed without a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


async def never(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


def of_uvicorn(app: Any = never) -> dict[str, Any]:
    """Return what uvicorn gives each connection."""
    config = uvicorn.Config(app, log_config=None, ws="none")
    config.load()
    return {"config": config, "server_state": ServerState(), "app_state": {}}


def connected(found: Connections, app: Any = never) -> tuple[Connection, Transport]:
    connection = Connection(found, **of_uvicorn(app))
    connection.connection_made(transport := Transport())
    return connection, transport


def is_refused(*parts: bytes) -> bool:
    """Return whether a connection is closed for the last of the parts that it receives."""

    async def feed() -> bool:
        connection, transport = connected(Connections(10))
        for part in parts[:-1]:
            connection.data_received(part)
            assert not transport.closed
        connection.data_received(parts[-1])
        assert transport.closed == transport.written.startswith(b"HTTP/1.1 400")
        return transport.closed

    return asyncio.run(feed())


def test_a_header_has_at_most_65536_bytes() -> None:
    def rest(size: int) -> bytes:
        start = b"ET / HTTP/1.1\r\nHost: "
        return start + b"a" * (size - len(start))

    assert [is_refused(b"G", rest(2**16)), is_refused(b"G", rest(2**16 + 1))] == [False, True]


def test_the_parts_of_a_body_may_take_8_bytes_for_each_byte_of_it() -> None:
    body = b"b" * 100

    def part(overhead: int) -> bytes:
        start, end = b"64;", b"\r\n"
        return start + b"a" * (overhead - len(start) - 2 * len(end)) + end + body + end

    most = 2**16 + 8 * len(body)
    assert [is_refused(CHUNKED, part(most)), is_refused(CHUNKED, part(most + 1))] == [False, True]


def test_sixteen_requests_may_wait_for_the_first() -> None:
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    assert [is_refused(*[request] * 17), is_refused(*[request] * 18)] == [False, True]


def test_a_connection_counts_once_and_is_idle_between_its_answers() -> None:
    async def live() -> None:
        found = Connections(10)

        async def open_one() -> tuple[Connection, Transport]:
            found._opening[asyncio.current_task()] = None  # type: ignore[index]
            opened = connected(found, answer)
            assert len(found) == 1
            return opened

        connection, transport = await asyncio.create_task(open_one())
        assert list(found._idle) == [connection]
        connection.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2)
        assert not found._idle
        async with asyncio.timeout(10):
            while not found._idle:
                await asyncio.sleep(0)
        assert transport.written.count(b"HTTP/1.1 200") == 2
        connection.connection_lost(None)
        assert len(found) == 0 and not found._idle

    asyncio.run(live())


def accept(found: Connections, seconds: float, sock_accept: Callable[[], Any], connect: Any = None) -> int:
    """Let connections be accepted for some time, in a loop that has these methods. -> the tasks that are left"""

    async def run() -> int:
        loop = asyncio.get_running_loop()

        async def accepted(listening: socket.socket) -> Any:
            return await sock_accept()

        loop.sock_accept = accepted  # type: ignore[method-assign, assignment]
        loop.connect_accepted_socket = connect  # type: ignore[method-assign]
        with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await found.accept(listening, lambda: pytest.fail("no client"), None)
        await asyncio.sleep(0)
        return len(asyncio.all_tasks()) - 1

    return asyncio.run(run())


def test_where_descriptors_end_the_longest_idle_client_is_closed() -> None:
    async def exhausted() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    client, found = Client(), Connections(10)
    found._open.add(client)  # type: ignore[arg-type]
    found._idle[client] = 0.0  # type: ignore[index]
    assert accept(found, 0.05, exhausted) == 0  # the sweep has ended
    assert client.closed_at > 0


def test_a_client_that_fails_while_it_opens_has_no_place() -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise ConnectionResetError

    pairs = [socket.socketpair() for _ in range(3)]
    left, found = list(pairs), Connections(10)

    async def one() -> Any:
        if not left:
            await asyncio.Event().wait()
        return left.pop()[0], None

    accept(found, 0.2, one, fail)
    assert len(found) == 0 and not left
    for ours, theirs in pairs:
        assert ours.fileno() == -1
        theirs.close()


def fed(make: Callable[[dict[str, Any]], Any], data: bytes) -> tuple[float, Transport, Any]:
    """Seconds of the processor that a connection takes for some data, its transport, and itself."""

    async def feed() -> tuple[float, bool, Transport, Any]:
        protocol, transport = make(of_uvicorn()), Transport()
        protocol.connection_made(transport)
        started = time.process_time()
        for at in range(0, len(data), 2**16):
            if not transport.closed:
                protocol.data_received(data[at : at + 2**16])
        seconds, was_closed = time.process_time() - started, transport.closed
        return seconds, was_closed, transport, protocol

    seconds, was_closed, transport, protocol = asyncio.run(feed())
    transport.closed = was_closed  # the end of the loop closes it
    return seconds, transport, protocol


def ours(arguments: dict[str, Any]) -> Connection:
    return Connection(Connections(10), **arguments)


def test_a_body_in_chunks_of_one_byte_costs_little() -> None:
    data = CHUNKED + b"1\r\na\r\n" * 50_000
    seconds, transport, protocol = fed(ours, data)
    assert not transport.closed
    assert len(protocol.cycle.body) == 50_000
    assert seconds < fed(lambda arguments: H11Protocol(**arguments), data)[0] / 4


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: " + b"a" * 2**20,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2**17,
        CHUNKED + (b"1;" + b"a" * 1000 + b"\r\na\r\n") * 1000,
        CHUNKED + b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 2**17,
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000,
    ],
    ids=["a header", "many headers", "extensions of chunks", "trailers", "pipelined requests"],
)
def test_what_is_no_body_is_bounded(data: bytes) -> None:
    _, transport, protocol = fed(ours, data)
    assert transport.closed
    assert b"400 Bad Request" in transport.written
    assert len(protocol.pipeline) <= connections.MAX_PIPELINED + 1


def test_a_body_may_be_large_and_its_header_too() -> None:
    header = b"POST / HTTP/1.1\r\nHost: a\r\nCookie: " + b"a" * 30_000
    _, transport, _ = fed(ours, header + b"\r\nContent-Length: 4000000\r\n\r\n" + b" " * 4_000_000)
    assert not transport.closed
