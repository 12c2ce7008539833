"""examples/http_server: batches concurrent requests, streams tokens, and keeps requests apart."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import chameleon_deploy
from chameleon_deploy.runtime import Sampling
from tests.cpp.c_interface import BUILD
from tests.shared_data import good_bundle

BUNDLE = good_bundle("chameleon_masked")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    server = subprocess.Popen([BUILD / "http_server", BUNDLE, "--port", str(number)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert re.search(r"listening", server.stdout.readline())
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", number), 1).close()
            break
        except ConnectionRefusedError:
            continue
    yield number
    server.terminate()
    server.wait()


def post(port: int, body: Any) -> tuple[int, list[dict[str, Any]]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/generate", body if isinstance(body, bytes) else json.dumps(body))
    response = connection.getresponse()
    lines = [json.loads(line) for line in response.read().splitlines()]
    connection.close()
    return response.status, lines


def test_concurrent_requests_get_their_own_results(port: int) -> None:
    runtime = chameleon_deploy.load(BUNDLE, mode="centroid")
    bodies: list[dict[str, Any]] = [
        {"prompt": prompt, "max_new_tokens": 1 + n % 7, "temperature": float(n % 2), "seed": n}
        for n, prompt in enumerate(["The river", "def f(x):", "import os", "Hello, world!"] * 16)
    ]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda body: post(port, body), bodies))
    for body, (status, lines) in zip(bodies, answers, strict=True):
        sampling = Sampling(temperature=body["temperature"], seed=body["seed"])
        expected = runtime.generate([body["prompt"]], max_new_tokens=body["max_new_tokens"], sampling=[sampling])[0]
        assert status == 200
        assert [line["token_id"] for line in lines] == expected.token_ids
        assert "".join(line["text"] for line in lines) == expected.text
        assert (lines[-1]["finish_reason"], lines[-1]["cluster_id"]) == (expected.finish_reason, expected.cluster_id)


def test_tokens_are_streamed(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/generate", json.dumps({"prompt": "The river", "max_new_tokens": 20}))
    response = connection.getresponse()
    assert response.getheader("Transfer-Encoding") == "chunked"
    first = json.loads(response.readline())
    assert "finish_reason" not in first
    connection.close()  # the row is cancelled; the next test finds the server well


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "input_invalid"),
        ({}, "input_invalid"),
        ({"prompt": ""}, "input_invalid"),
        ({"prompt": 3}, "input_invalid"),
        ({"prompt": "x " * 500}, "text_too_long"),
        ({"prompt": "x", "max_new_tokens": 0}, "input_invalid"),
        ({"prompt": "x", "temperature": -1}, "input_invalid"),
        ({"prompt": "x", "stop": [""]}, "input_invalid"),
    ],
)
def test_a_bad_request_is_refused_alone(port: int, body: Any, code: str) -> None:
    status, lines = post(port, body)
    assert (status, lines[0]["code"]) == (400, code)
    assert post(port, {"prompt": "The river", "max_new_tokens": 3})[1][-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--port", "abc"], "usage"),
        (["--port", "65536"], "usage"),
        (["--max-batch", "0"], "usage"),
        (["--surprise", "1"], "usage"),
        (["--port"], "usage"),
        (["--mode", "nonsense"], "mode_unavailable"),
    ],
)
def test_a_bad_option_is_one_line(options: list[str], code: str) -> None:
    result = subprocess.run([BUILD / "http_server", BUNDLE, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.fullmatch(rf"error: .*\[{code}\]\n", result.stderr)
