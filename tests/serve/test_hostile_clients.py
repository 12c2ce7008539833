"""One client neither stops nor changes others: each test plants a client that once did."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.scoring import prompt_logprobs
from chameleon_deploy.serve import connections, endpoint, logs, scoring
from chameleon_deploy.serve.connections import Connections
from tests.serving import COMMAND, InThread, Running, listening, process, running, wait_for


def post(path: str, raw: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


def is_closed(client: socket.socket, seconds: float) -> bool:
    client.settimeout(seconds)
    try:
        while client.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


# Settings


@pytest.mark.parametrize(
    ("param", "value"),
    [("stop", "a" * 350_000), ("stop", ["a" * 1025]), ("stop_token_ids", list(range(300)) * 1000),
     ("logit_bias", {str(i): 1 for i in range(2000)})],
)  # fmt: skip
def test_settings_beyond_their_limits_are_refused(server: InThread, param: str, value: Any) -> None:
    refused = server.post("/v1/completions", prompt="The river", **{param: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert len(refused.content) < 800


@pytest.mark.parametrize("body", [{"model": "m" * 2**20}, {"mode": "m" * 2**20}, {"model": "m", "mode": "none"}])
def test_an_error_repeats_little_of_what_was_sent(server: InThread, body: dict[str, str]) -> None:
    refused = server.post("/v1/completions", prompt="a", **body)
    assert refused.status_code in (400, 404)
    assert len(refused.content) < 800


# The engine


def test_a_step_that_takes_too_long_is_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, go_on = Slots.step, threading.Event()

    def slow_step(slots: Slots, *arguments: Any) -> Any:
        go_on.wait(60)
        return step(slots, *arguments)

    def slow_steps(server: InThread) -> str:
        text = httpx.get(f"{server.url}/metrics").text
        return str(re.findall(r"^chameleon_slow_steps_total (.*)", text, re.MULTILINE)[0])

    with running(bundle, max_step_seconds=0.2) as server, ThreadPoolExecutor(1) as clients:
        assert server.post("/v1/completions", prompt="The river", max_tokens=3).status_code == 200
        assert (slow_steps(server), httpx.get(f"{server.url}/health").status_code) == ("0.0", 200)
        monkeypatch.setattr(Slots, "step", slow_step)
        kept = clients.submit(server.post, "/v1/completions", prompt="The river", max_tokens=3)
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/health").json()["error"]["code"] == "step_slow"
        wait_for(lambda: slow_steps(server) == "1.0")
        go_on.set()
        assert kept.result().status_code == 200
        wait_for(lambda: server.served.engine.iteration_began is None)
        assert (slow_steps(server), httpx.get(f"{server.url}/health").status_code) == ("1.0", 200)
    assert [record.levelname for record in caplog.records if "a step of the engine" in record.message] == ["ERROR"]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scoring takes 50 ms a prompt, and here is what was scored."""
    rows: list[int] = []
    row, logprobs = scoring._score_row, prompt_logprobs

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            time.sleep(0.05)
            rows.append(1)
            return function(*arguments)

        return slow

    monkeypatch.setattr(scoring, "_score_row", slowly(row))
    monkeypatch.setattr(scoring, "prompt_logprobs", slowly(logprobs))
    return rows


SCORES = post("/v1/score", json.dumps({"input": ["The river"] * 30}).encode())
ECHO = post("/v1/completions", json.dumps({"prompt": ["The river"] * 30, "echo": True, "logprobs": 1}).encode())


def leave_while_scoring(server: InThread, request: bytes, scored: list[int]) -> None:
    with server.connect() as client:
        client.sendall(request)
        wait_for(lambda: len(scored) >= 1)
    wait_for(lambda: server.service._requests.total() == 0, 0.5)
    assert len(scored) <= 4
    server.wait_until_idle()


@pytest.mark.parametrize("request_", [SCORES, ECHO])
def test_scores_stop_when_their_client_leaves(server: InThread, request_: bytes, scored: list[int]) -> None:
    leave_while_scoring(server, request_, scored)


def test_scores_that_go_on_are_seen(server: InThread, scored: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    async def blind(receive: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(endpoint, "_left", blind)
    with pytest.raises(AssertionError):
        leave_while_scoring(server, SCORES, scored)
    wait_for(lambda: server.service._requests.total() == 0)


@pytest.mark.usefixtures("scored")
def test_scores_that_do_not_end_while_draining_are_told(bundle: Path) -> None:
    with running(bundle, drain_seconds=0.1) as server, ThreadPoolExecutor(1) as clients:
        kept = clients.submit(server.post, "/v1/score", input=["The river"] * 100)
        wait_for(lambda: server.service._requests.total() == 1)
        server.server.stop()
        answer = kept.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "closed")


def test_a_changed_bundle_answers_nothing(bundle: Path, copy_of: Callable[[Path], Path]) -> None:
    copy = copy_of(bundle)
    with running(copy) as server:
        (copy / "weights.bin").touch()
        for path in ("/v1/completions", "/v1/score"):
            answer = server.post(path, prompt="a", input="a")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "bundle_changed")
            assert str(copy) not in answer.text


# Connections


@pytest.fixture
def hasty(server: InThread, monkeypatch: pytest.MonkeyPatch) -> InThread:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.8)
    time.sleep(1.5)  # a sweep with the time before may be under way
    return server


def close_silent_clients(server: Running) -> None:
    with ExitStack() as opened:
        silent, half, slow, kept, asking = (opened.enter_context(server.connect()) for _ in range(5))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
        kept.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        assert kept.recv(4096).startswith(b"HTTP/1.1 200")
        kept.sendall(b"GET /ver")
        asking.sendall(post("/v1/completions", b'{"prompt": "a"}')[:-1])  # has a header: other limits are for it
        for byte in b"GET /":
            slow.sendall(bytes([byte]))
            time.sleep(0.1)
        assert all(is_closed(client, 2) for client in (silent, half, slow, kept))
        asking.sendall(b"}")
        asking.settimeout(10)
        assert asking.recv(4096).startswith(b"HTTP/1.1 200")


def test_clients_without_a_whole_header_are_closed(hasty: InThread) -> None:
    close_silent_clients(hasty)


def test_clients_that_stay_are_seen(server: InThread) -> None:
    with pytest.raises(AssertionError):
        close_silent_clients(server)


def test_at_the_limit_of_descriptors_new_clients_are_served(bundle: Path, tmp_path: Path) -> None:
    """A process that may open 120 files, and 300 silent clients."""
    limited = ["bash", "-c", 'ulimit -n 120; exec "$@"', "bash", *COMMAND, str(bundle), "--port", "0"]
    # The reader of the log is left last: it ends where the server does.
    with ThreadPoolExecutor(1) as log, listening(limited) as (server, url), ExitStack() as opened:
        assert server.stderr
        lines = log.submit(server.stderr.readlines)
        host, port = url.removeprefix("http://").split(":")
        for number in range(300):
            opened.enter_context(socket.create_connection((host, int(port))))
            if number % 50 == 0:
                assert httpx.get(f"{url}/health", timeout=8).status_code == 200
        for _ in range(3):
            assert httpx.get(f"{url}/health", timeout=8).status_code == 200
        found = re.search(r"chameleon_connections (\d+)", httpx.get(f"{url}/metrics").text)
        assert found and int(found[1]) <= 120 - connections.RESERVED  # some may have been silent for too long since
        server.terminate()
        assert server.wait(30) == 0
        assert sum("connections are open, which is the limit" in line for line in lines.result()) == 1
        assert len(lines.result()) < 40


def test_a_failing_accept_neither_spins_nor_fills_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Descriptors can end all the same: others of the process take them."""

    async def accept() -> int:
        loop, calls = asyncio.get_running_loop(), 0

        async def exhausted(listening: socket.socket) -> Any:
            nonlocal calls
            calls += 1
            raise OSError(errno.EMFILE, "too many open files")

        loop.sock_accept = exhausted  # type: ignore[method-assign, assignment]
        with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(TimeoutError):
            async with asyncio.timeout(0.35):
                await Connections(10).accept(listening, lambda: pytest.fail("no client"), None)
        return calls

    assert asyncio.run(accept()) <= 4
    assert len(caplog.records) == 1


# Bodies


def test_unfinished_bodies_are_bounded_together(bundle: Path) -> None:
    unfinished = post("/v1/completions", b" " * 900_000)[:-200_000]
    with running(bundle, max_body_bytes=10**6, max_unfinished_bytes=10**6) as server, ExitStack() as opened:
        first, second = (opened.enter_context(server.connect()) for _ in range(2))
        first.sendall(unfinished)
        wait_for(lambda: server.service.unfinished_bodies._left < 500_000)
        second.sendall(unfinished)
        second.settimeout(10)
        assert second.recv(4096).startswith(b"HTTP/1.1 429")
        assert server.post("/v1/completions", prompt="The river", max_tokens=1).status_code == 200
        first.close()
        wait_for(lambda: server.service.unfinished_bodies._left == 10**6)
        assert server.post("/v1/completions", prompt="a" * 900_000).json()["error"]["code"] == "text_too_long"


# The log


FORGED = "/x\n2026-01-01 00:00:00,000 INFO POST /v1/FORGED 200\x1b[31m\r\x85\u2028\u2029\x0b"


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ |    ", line) for line in lines), lines
    assert not any(re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line) for line in lines), lines


def test_no_byte_of_a_request_forges_a_log_line(log_lines: list[str]) -> None:
    formatter = logs._LineFormatter("%(asctime)s %(levelname)s %(message)s")
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s %s %s", ("GET", FORGED, 404), None)
    record.body = FORGED
    log_lines += formatter.format(record).split("\n")
    assert len(log_lines) == 1
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        failed = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), (type(error), error, error.__traceback__))
    log_lines += formatter.format(failed).split("\n")
    assert len(log_lines) > 3  # the trace is there


def test_a_path_of_control_characters_is_one_line(bundle: Path, log_lines: list[str]) -> None:
    with ThreadPoolExecutor(1) as log, process(bundle) as (server, url):
        assert server.stderr
        lines = log.submit(server.stderr.readlines)
        httpx.get(f"{url}/x%0A2026-01-01%2000:00:00,000%20INFO%20POST%20/v1/FORGED%20200%1b[31m%C2%85%E2%80%A8")
        server.terminate()
        assert server.wait(30) == 0
        log_lines += [line.rstrip("\n") for line in lines.result()]
    assert sum("FORGED" in line for line in log_lines) == 1
