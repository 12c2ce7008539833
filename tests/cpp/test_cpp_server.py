"""chameleon-server alone: its connections, its end, and options that it refuses. tests/serve asks both servers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from chameleon_deploy.serve.bodies import parse
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.schemas import CompletionRequest
from tests.serving import COMMANDS, Running, process, running_cpp, wait_for
from tests.shared_data import good_bundle

BUNDLE = good_bundle("chameleon_masked")
CPP = COMMANDS["cpp"]
# Seconds of work, on one row at a time.
LONG = {"prompt": [[1]], "max_tokens": 47, "ignore_eos": True, "mode": "none", "n": 128}
MANY = {**LONG, "prompt": [[1]] * 16}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running_cpp(BUNDLE, rows=1, max_waiting=2048) as found:
        yield found


def raw(body: dict[str, Any], path: str = "/v1/completions", headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
    return head.encode() + content


def accepted(url: str) -> float:
    """How many prompts the server has accepted."""
    found = re.findall(r"^chameleon_requests_total\{.*\} (.*)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return sum(map(float, found))


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels(server: Running, stream: bool) -> None:
    server.wait_until_idle()
    with server.connect() as client:
        client.sendall(raw({**MANY, "stream": stream}))
        wait_for(lambda: server.rows("running") == 1)
    wait_for(lambda: server.rows("running") + server.rows("waiting") == 0)
    text = httpx.get(f"{server.url}/metrics").text
    cancelled = re.search(r"^chameleon_requests_cancelled_total (.*)$", text, re.MULTILINE)
    assert cancelled and float(cancelled[1]) > 1000  # nearly all rows of the request, and none of them ran


def test_a_full_queue_is_a_429() -> None:
    with running_cpp(BUNDLE, rows=1, max_waiting=200) as server, ThreadPoolExecutor(1) as clients:
        kept = clients.submit(server.post, "/v1/completions", **LONG)
        wait_for(lambda: server.rows("running") == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            server.openai().completions.create(model=server.name, prompt="a", n=128)
        assert refused.value.code == "queue_full"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert len(kept.result().json()["choices"]) == 128


def test_more_requests_than_are_allowed_are_a_429() -> None:
    with running_cpp(BUNDLE, rows=1, max_requests=1) as server, ThreadPoolExecutor(1) as clients:
        kept = clients.submit(server.post, "/v1/completions", **LONG)
        wait_for(lambda: server.rows("running") == 1)
        refused = server.post("/tokenize", prompt="a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert kept.result().status_code == 200
        assert server.post("/tokenize", prompt="a").status_code == 200


def test_a_drain_finishes_what_was_accepted() -> None:
    with (
        process(BUNDLE, "--rows", "1", command=CPP) as (started, url),
        ThreadPoolExecutor(2) as clients,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        kept = [
            clients.submit(httpx.post, f"{url}/v1/completions", json={**LONG, "stream": stream}, timeout=60)
            for stream in (False, True)
        ]
        wait_for(lambda: accepted(url) == 2)
        started.send_signal(signal.SIGTERM)
        wait_for(lambda: http.get("/health").status_code == 503)
        assert http.get("/health").json()["error"]["code"] == "draining"
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        answers = [future.result() for future in kept]
        assert answers[0].json()["usage"]["completion_tokens"] == 47 * 128
        assert answers[1].text.endswith("data: [DONE]\n\n")
        assert started.wait(60) == 0


@pytest.mark.parametrize(("drain", "signals"), [("0.1", 1), ("60", 2)])
def test_what_does_not_end_while_draining_is_told(drain: str, signals: int) -> None:
    options = ["--rows", "1", "--max-waiting", "4096", "--drain-seconds", drain]
    with process(BUNDLE, *options, command=CPP) as (started, url), ThreadPoolExecutor(2) as clients:
        kept = [
            clients.submit(httpx.post, f"{url}/v1/completions", json={**MANY, "stream": stream}, timeout=60)
            for stream in (False, True)
        ]
        wait_for(lambda: accepted(url) == 32)
        for _ in range(signals):
            started.send_signal(signal.SIGTERM)
            time.sleep(0.1)  # so that they are two
        whole, stream = (future.result() for future in kept)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "closed")
        assert json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "closed"
        assert started.wait(60) == 0


def test_a_body_in_chunks_and_one_without_a_length(server: Running) -> None:
    with server.http() as http:
        answer = http.post("/tokenize", content=iter([b'{"prompt":', b' "a"}']))
        assert answer.json()["count"] == 1
    with server.connect() as client:
        client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_the_type_of_a_body_is_not_asked_for(server: Running) -> None:
    with server.http() as http:
        for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json"):
            content = json.dumps({"prompt": "a " * 8000})
            answer = http.post("/tokenize", content=content, headers={"Content-Type": kind})
            assert answer.status_code == 200, answer.text
        answer = http.post("/tokenize", files={"prompt": b"a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "input_invalid")


def test_a_body_that_nobody_reads_closes_the_connection(server: Running) -> None:
    """Else a proxy would take what follows, which the client wrote, for another caller's answer."""
    hidden = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    for line in (b"GET /health", b"POST /nothing", b"DELETE /health"):
        with server.connect() as client:
            client.sendall(line + b" HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(hidden) + hidden)
            assert b"\r\nConnection: close\r\n" in client.recv(65536), line


def test_what_is_no_http_is_refused(server: Running) -> None:
    for sent in (b"\0\1\2\r\n\r\n", b"GET /health\r\n\r\n", b"GET " + b"/a" * 5_000 + b" HTTP/1.1\r\n\r\n"):
        with server.connect() as client:
            client.sendall(sent)
            assert client.recv(65536).startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_head_has_no_body(server: Running) -> None:
    answer = httpx.head(f"{server.url}/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_many_idle_connections_and_a_burst(server: Running) -> None:
    opened = [server.connect() for _ in range(400)]
    with ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(lambda i: server.post("/tokenize", prompt=f"a {i}").status_code, range(200)))
    assert set(answers) == {200}
    for client in opened:
        client.close()


def test_a_signal_while_the_bundle_loads_ends_the_server() -> None:
    with subprocess.Popen([*CPP, BUNDLE, "--port", "0"], stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        assert "listening on" in started.stderr.readline()  # the bundle is not read yet
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--port", "abc"], "usage"),
        (["--port", "65536"], "usage"),
        (["--rows", "0"], "usage"),
        (["--surprise", "1"], "usage"),
        (["--port"], "usage"),
        (["--drain-seconds", "-1"], "usage"),
        (["--ssl-certfile", "/nothing.pem"], "usage"),
        (["--mode", "nonsense"], "mode_unavailable"),
        (["--mode", "tenant", "--port", "0"], "mode_unavailable"),
        (["--api-keys", "/nothing.json"], "input_invalid"),
        (["--prefill-tokens", "1", "--port", "0"], "input_invalid"),
        (["--provider", "abacus", "--port", "0"], "provider_unavailable"),
        (["--host", "256.0.0.1"], "input_invalid"),
    ],
)
def test_a_bad_option_is_one_line(options: list[str], code: str) -> None:
    result = subprocess.run([*CPP, BUNDLE, *options], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert re.fullmatch(rf"error: .*\[{code}\]", result.stderr.splitlines()[-1])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"": "a"}', '{"a": ""}', '{"a": 3}', "\xff"])
def test_a_bad_file_of_keys(tmp_path: Any, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(content.encode("latin-1"))
    result = subprocess.run([*CPP, BUNDLE, "--api-keys", file], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert str(file) in result.stderr and result.stderr.endswith("[input_invalid]\n")


BODIES = [
    "{}", "[]", "3", '{"prompt": 3}', '{"prompt": ["a", 1.5]}', '{"prompt": ["a", true]}', '{"prompt": [[1, "b"]]}',
    *(f'{{"prompt": "a", {field}}}' for field in (
        '"n": 1.0', '"n": true', '"n": 0', '"n": 129', '"n": "x"', '"temperature": "x"', '"temperature": -0.5',
        '"top_p": 0', '"top_p": 2', '"stop": 5', '"stop": ["a", 5]', '"stop": ["a", "b", "c", "d", "e"]',
        '"logit_bias": {"x": 1}', '"logit_bias": {"05": 1}', '"logit_bias": {"5": 101}', '"logit_bias": {"5": "a"}',
        '"logit_bias": []', '"mode": "wild"', '"mode": 3', '"stream": 1', '"stream_options": []',
        '"stream_options": {"include_usage": 3}', '"stop_token_ids": [-1]', '"stop_token_ids": 3', '"logprobs": 6',
        '"logprobs": true', '"user": 3', '"top_k": -2', '"repetition_penalty": 0', '"seed": "x"', '"suffix": []',
        '"adapt_tokens": 0', '"presence_penalty": 2.5', '"best_of": 0', '"max_tokens": -1', '"model": 3',
    )),
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_a_bad_field_gets_the_message_of_the_python_server(server: Running, body: str) -> None:
    with pytest.raises(ApiError) as expected:
        parse(body.encode(), CompletionRequest)
    with server.http() as http:
        error = http.post("/v1/completions", content=body).json()["error"]
    assert (error["message"], error["param"]) == (expected.value.message, expected.value.param)
