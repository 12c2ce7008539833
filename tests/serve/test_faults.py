"""Each fault, limit and disconnect concerns its own request."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from chameleon_deploy import Sampling
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import ModeError
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.serve import endpoint
from chameleon_deploy.serve.event_stream import EventStream
from chameleon_deploy.serve.service import Service
from chameleon_deploy.serve.settings import Settings
from tests.rows import random_rows
from tests.serving import InThread, Running, running, wait_for

LONG = {"max_tokens": 100, "ignore_eos": True, "mode": "none"}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 20 ms, so that a long request is still there when a test looks."""
    step = Slots.step

    def slow_step(slots: Slots, *arguments: Any) -> Any:
        time.sleep(0.02)
        return step(slots, *arguments)

    monkeypatch.setattr(Slots, "step", slow_step)


def request(**body: Any) -> bytes:
    raw = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw


def running_rows(server: InThread) -> int:
    return server.served.engine.stats().running


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels(server: InThread, stream: bool) -> None:
    server.wait_until_idle()
    with server.connect() as client:
        client.sendall(request(prompt="The river", stream=stream, **LONG))
        wait_for(lambda: running_rows(server) == 1)
    started = time.monotonic()
    wait_for(lambda: running_rows(server) == 0)
    assert time.monotonic() - started < 1  # the whole request takes two seconds


@pytest.mark.usefixtures("slow")
def test_a_disconnect_that_is_not_noticed_is_seen(server: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    async def blind(receive: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr("chameleon_deploy.serve.endpoint._left", blind)
    with pytest.raises(AssertionError):
        test_a_disconnect_cancels(server, False)
    server.wait_until_idle()


def test_connections_that_send_or_read_nothing_harm_nobody(server: Running) -> None:
    with ExitStack() as opened:
        for _ in range(250):
            opened.enter_context(server.connect())
        for number in range(250):
            client = opened.enter_context(server.connect())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            if number % 10 == 0:
                client.sendall(request(prompt="The river", stream=True, max_tokens=20, mode="none"))
            else:
                client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        for _ in range(5):
            answer = server.post("/v1/completions", prompt="The river", max_tokens=5)
            assert answer.status_code == 200
    server.wait_until_idle()


def test_mixed_requests_at_once_are_each_as_if_alone(server: Running) -> None:
    chance = random.Random(4)
    bodies: list[dict[str, Any]] = [
        {
            "prompt": ids,
            "mode": chance.choice(["none", "centroid", "request"]),
            "max_tokens": chance.randint(1, 20),
            "temperature": chance.choice([0, 1.1]),
            "seed": number,
            "n": chance.choice([1, 1, 3]),
            "return_token_ids": True,
        }
        for number, ids in enumerate(random_rows(6, 48, 60))
    ]
    with ThreadPoolExecutor(16) as clients:
        together = list(clients.map(lambda body: server.post("/v1/completions", **body).json()["choices"], bodies))
    for body, choices in zip(bodies, together, strict=True):
        sampling = Sampling(temperature=body["temperature"], seed=body["seed"])
        alone = server.runtime.generate(
            [body["prompt"]], max_new_tokens=body["max_tokens"], mode=body["mode"], sampling=[sampling]
        )[0]
        assert (choices[0]["token_ids"], choices[0]["text"]) == (alone.token_ids, alone.text)
        assert len(choices) == body["n"]


@pytest.mark.usefixtures("slow")
def test_a_full_queue_is_a_429(bundle: Path) -> None:
    with running(bundle, rows=1, max_waiting=1) as server, ThreadPoolExecutor(2) as clients:
        kept = [clients.submit(server.post, "/v1/completions", prompt="The river", **LONG)]
        wait_for(lambda: server.served.engine.stats().running == 1)
        kept.append(clients.submit(server.post, "/v1/completions", prompt="The river", **LONG))
        wait_for(lambda: server.served.engine.stats().waiting == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            server.openai().completions.create(model=server.name, prompt="The river")
        assert refused.value.code == "queue_full"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert [future.result().status_code for future in kept] == [200, 200]


@pytest.mark.usefixtures("slow")
def test_more_requests_than_are_allowed_are_a_429(bundle: Path) -> None:
    with running(bundle, max_requests=1) as server, ThreadPoolExecutor(1) as clients:
        kept = clients.submit(server.post, "/v1/completions", prompt="The river", **LONG)
        wait_for(lambda: running_rows(server) == 1)
        refused = server.post("/tokenize", prompt="a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert kept.result().status_code == 200
        assert server.post("/tokenize", prompt="a").status_code == 200


def test_a_body_that_is_too_large_is_a_413(bundle: Path) -> None:
    with running(bundle, max_body_bytes=1000) as server:
        refused = server.post("/v1/completions", prompt="a" * 10_000_000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
        assert server.post("/v1/completions", prompt="a" * 50, max_tokens=1).status_code == 200


def test_a_row_that_is_not_finite_fails_alone(server: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, bad = server_choose(), [7, 7, 7]

    def damaged(sampler: Any, logits: Any, *more: Any) -> Any:
        if sampler.prompt == bad:
            logits = np.full_like(logits, np.nan)
        return choose(sampler, logits, *more)

    plant(monkeypatch, damaged)
    fields = {"max_tokens": 3, "mode": "none", "logprobs": 0}
    with ThreadPoolExecutor(4) as clients:
        prompts = [[1, 2, 3], bad, [4, 5, 6], bad]
        answers = list(clients.map(lambda ids: server.post("/v1/completions", prompt=ids, **fields), prompts))
    assert [answer.status_code for answer in answers] == [200, 500, 200, 500]
    assert answers[1].json()["error"]["code"] == "not_finite"
    events = server.post("/v1/completions", prompt=bad, stream=True, **fields).text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "not_finite"


def server_choose() -> Callable[..., Any]:
    from chameleon_deploy.runtime.sampling import Sampler

    return Sampler.choose


def plant(monkeypatch: pytest.MonkeyPatch, choose: Callable[..., Any]) -> None:
    """Replace how rows choose, and let a sampler remember its prompt."""
    from chameleon_deploy.runtime.sampling import Sampler

    begin = Sampler.__init__

    def remember(sampler: Any, sampling: Any, prompt: Any, *more: Any) -> None:
        begin(sampler, sampling, prompt, *more)
        sampler.prompt = prompt

    monkeypatch.setattr(Sampler, "__init__", remember)
    monkeypatch.setattr(Sampler, "choose", choose)


def test_an_exception_in_a_session_ends_the_requests_in_it(server: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Slots.step

    def fail(slots: Slots, *arguments: Any) -> Any:
        monkeypatch.setattr(Slots, "step", step)  # once
        raise RuntimeError("out of memory")

    server.wait_until_idle()
    monkeypatch.setattr(Slots, "step", fail)
    failed = server.post("/v1/completions", prompt="The river", max_tokens=3)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "request_failed")
    assert server.post("/v1/completions", prompt="The river", max_tokens=3).status_code == 200


def test_a_fault_that_nobody_foresaw_tells_nothing(server: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chameleon_deploy.serve.completions.check", lambda *_: 1 / 0)
    failed = server.post("/v1/completions", prompt="secret")
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "internal_error"
    assert "division" not in failed.text
    assert failed.headers["x-request-id"]


@pytest.fixture(scope="module")
def keyed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text('{"sk-a": "a", "sk-b": "b"}')
    with running(bundle, api_keys=file, cohort_window_ms=300) as server:
        yield server


def test_a_key_is_asked_for(keyed: Running) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        keyed.openai("sk-wrong").completions.create(model=keyed.name, prompt="a")
    assert refused.value.code == "invalid_api_key"
    with keyed.http() as http:
        for path, methods in http.get("/openapi.json").json()["paths"].items():
            open_to_all = path in ("/health", "/version")
            for method in methods:
                answer = http.request(method, path.format(model=keyed.name), json={} if method == "post" else None)
                assert answer.status_code == (200 if open_to_all else 401), (method, path)
    assert keyed.openai("sk-a").completions.create(model=keyed.name, prompt="a", max_tokens=1).choices


def test_a_tenant_is_its_keys_and_shares_with_nobody(keyed: Running) -> None:
    rows = random_rows(8, 2, 20)

    def ask(key: str, ids: list[int]) -> Any:
        answer: Any = keyed.openai(key).completions.create(model=f"{keyed.name}:tenant", prompt=ids, max_tokens=2)
        return answer.choices[0].chameleon

    with ThreadPoolExecutor(3) as clients:
        found = list(clients.map(ask, ("sk-a", "sk-a", "sk-b"), (rows[0], rows[1], rows[0])))
    assert found[0]["cohort"] == found[1]["cohort"]
    assert [each["cohort"]["size"] for each in found] == [2, 2, 1]


def test_the_scores_of_an_open_cohort_are_refused(keyed: Running) -> None:
    with keyed.http() as http:
        body = {"prompt": "a", "echo": True, "logprobs": 1, "mode": "cohort"}
        answer = http.post("/v1/completions", json=body, headers={"Authorization": "Bearer sk-a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")


def test_a_default_mode_that_cannot_be_served(bundle: Path) -> None:
    modes: tuple[Mode, ...] = ("static", "tenant")
    for mode in modes:
        with pytest.raises(ModeError):
            Service(Settings(bundle, mode=mode)).open()


def test_a_changed_bundle_is_unhealthy(bundle: Path, copy_of: Callable[[Path], Path]) -> None:
    copy = copy_of(bundle)
    with running(copy) as server:
        (copy / "bundle.json").touch()
        with server.http() as http:
            answer = http.get("/health")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "bundle_changed")


@pytest.mark.usefixtures("slow")
def test_a_drain_finishes_what_was_accepted(bundle: Path) -> None:
    with running(bundle) as server, ThreadPoolExecutor(2) as clients, server.http() as http:
        kept = [
            clients.submit(server.post, "/v1/completions", prompt="The river", stream=stream, **LONG)
            for stream in (False, True)
        ]
        wait_for(lambda: running_rows(server) == 2)
        server.server.stop()
        wait_for(lambda: http.get("/health").status_code == 503)
        assert http.get("/health").json()["error"]["code"] == "draining"
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        answers = [future.result() for future in kept]
        assert answers[0].json()["usage"]["completion_tokens"] == 100
        assert answers[1].text.endswith("data: [DONE]\n\n")


@pytest.mark.usefixtures("slow")
def test_what_does_not_end_while_draining_is_told(bundle: Path) -> None:
    with running(bundle, drain_seconds=0.1) as server, ThreadPoolExecutor(2) as clients:
        kept = [
            clients.submit(server.post, "/v1/completions", prompt="The river", stream=stream, **LONG)
            for stream in (False, True)
        ]
        wait_for(lambda: running_rows(server) == 2)
        server.server.stop()
        whole, stream = (future.result() for future in kept)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "closed")
        assert json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "closed"


@pytest.mark.usefixtures("slow")
def test_a_second_signal_does_not_wait(bundle: Path) -> None:
    with running(bundle, drain_seconds=60) as server, ThreadPoolExecutor(1) as clients, server.http() as http:
        kept = clients.submit(server.post, "/v1/completions", prompt="The river", n=8, **LONG)
        wait_for(lambda: running_rows(server) == 8)
        server.server.handle_exit(15, None)
        wait_for(lambda: http.get("/health").status_code == 503)
        started = time.monotonic()
        server.server.handle_exit(15, None)
        server.thread.join(60)
        assert time.monotonic() - started < 1.5  # the request takes two seconds
        kept.exception()


def test_a_drain_waits_for_scores(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chameleon_deploy.serve import scoring

    score_row = scoring._score_row

    def slow_row(*arguments: Any) -> Any:
        time.sleep(0.5)
        return score_row(*arguments)

    monkeypatch.setattr(scoring, "_score_row", slow_row)
    with running(bundle) as server, ThreadPoolExecutor(1) as clients:
        kept = clients.submit(server.post, "/v1/score", input=["The river", "A town"])
        wait_for(lambda: server.service._requests.total() == 1)
        server.server.stop()
        assert len(kept.result().json()["data"]) == 2


def test_nothing_is_left_over(bundle: Path) -> None:
    before = threading.active_count()
    with running(bundle) as server:
        server.post("/v1/completions", prompt="The river", max_tokens=2, echo=True, logprobs=1)
    wait_for(lambda: threading.active_count() <= before + 1)  # asyncio's pool may linger


def test_loading_is_told(bundle: Path) -> None:
    from starlette.testclient import TestClient

    from chameleon_deploy.serve.app import build

    client = TestClient(build(Service(Settings(bundle))))
    for answer in (client.get("/health"), client.post("/v1/completions", json={"prompt": "a"})):
        assert isinstance(answer, httpx.Response) or answer.status_code
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")


@pytest.mark.parametrize("reads", [True, False])
def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """However long the whole takes: what counts is the time of one part."""
    monkeypatch.setattr(endpoint, "SEND_SECONDS", 0.2)
    sent, closed = list[bytes](), list[bool]()

    async def parts() -> AsyncGenerator[bytes, None]:
        try:
            for _ in range(20):
                yield b"part"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        await asyncio.sleep(0.03 if reads or len(sent) < 3 else 3600)
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        raise NotImplementedError

    asyncio.run(endpoint._deliver(EventStream(parts()), {"type": "http"}, receive, send))
    assert sent.count(b"part") == (20 if reads else 2)
    assert closed == [True]
