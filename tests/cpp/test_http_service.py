"""runtime/examples/http_service.cpp as a process: completions whole and in parts, disconnects, errors and its end."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import chameleon_deploy
from chameleon_deploy import Sampling
from tests.cpp.c_interface import BUILD
from tests.serving import Running, listening, wait_for
from tests.shared_data import good_bundle

BUNDLE = good_bundle("chameleon_masked")
PROGRAM = str(BUILD / "tests" / "http_service")
PROMPTS = ["The river", "def f(x):", "A lamp"]
MANY = {"prompt": ["a"] * 500, "max_tokens": 40, "temperature": 1}  # nearly as many rows as one request may have


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with listening([PROGRAM, str(BUNDLE), "0"]) as (_, url):
        yield Running(url, "any", chameleon_deploy.load(BUNDLE, threads=1))


def rows(url: str) -> int:
    count: int = httpx.get(f"{url}/health").json()["rows"]
    return count


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_completion_is_what_generate_gives(server: Running, temperature: float) -> None:
    sampling = [Sampling(temperature=temperature, seed=5)] * len(PROMPTS)
    expected = server.runtime.generate(PROMPTS, max_new_tokens=12, sampling=sampling)
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": temperature, "seed": 5, "model": "any"}
    whole = server.openai().completions.create(prompt=PROMPTS, **fields)
    assert [(c.index, c.text, c.finish_reason) for c in whole.choices] == [
        (row, generation.text, generation.finish_reason) for row, generation in enumerate(expected)
    ]
    texts, reasons, parts = [""] * len(PROMPTS), [""] * len(PROMPTS), 0
    for part in server.openai().completions.create(prompt=PROMPTS, stream=True, **fields):
        texts[part.choices[0].index] += part.choices[0].text
        reasons[part.choices[0].index] = part.choices[0].finish_reason or ""
        parts += 1
    assert texts == [generation.text for generation in expected]
    assert reasons == [generation.finish_reason for generation in expected]
    assert parts == sum(len(generation.token_ids) for generation in expected)
    end = server.post("/v1/completions", prompt="a", stream=True).text
    assert end.endswith("\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels(server: Running, stream: bool) -> None:
    started = time.monotonic()
    assert server.post("/v1/completions", **MANY).status_code == 200
    whole = time.monotonic() - started
    content = json.dumps({**MANY, "stream": stream}).encode()
    with server.connect() as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(content)
        client.sendall(head + content)
        wait_for(lambda: rows(server.url) > 0)
    started = time.monotonic()
    wait_for(lambda: rows(server.url) == 0)
    assert time.monotonic() - started < whole / 2


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("{", 400, "input_invalid"),
        ("[]", 400, "input_invalid"),
        ("3", 400, "input_invalid"),
        ("{}", 400, "input_invalid"),
        ('{"prompt": 3}', 400, "input_invalid"),
        ('{"prompt": [[1]]}', 400, "input_invalid"),
        ('{"prompt": ""}', 400, "input_invalid"),
        ('{"prompt": "\\ud800"}', 400, "input_invalid"),
        ('{"prompt": "a", "n": 2}', 400, "input_invalid"),
        ('{"prompt": "a", "max_tokens": 0}', 400, "input_invalid"),
        ('{"prompt": "a", "temperature": -1}', 400, "input_invalid"),
        ('{"prompt": "a", "stream": "yes"}', 400, "input_invalid"),
        (json.dumps({"prompt": "a b" * 100}), 400, "text_too_long"),
        (json.dumps({"prompt": ["a"] * 1100}), 400, "input_invalid"),
    ],
)
def test_a_mistake_is_told(server: Running, body: str, status: int, code: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def test_a_full_queue_is_a_429(server: Running) -> None:
    with ThreadPoolExecutor(8) as clients:  # 4,000 rows at once, and 1,032 places
        answers = list(clients.map(lambda _: server.post("/v1/completions", **MANY), range(8)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    kept = [answer for answer in answers if answer.status_code == 200]
    assert len(kept) + len(refused) == 8
    assert {len(answer.json()["choices"]) for answer in kept} == {500}


def test_sigterm_ends_it_when_its_answers_are_given() -> None:
    with listening([PROGRAM, str(BUNDLE), "0"]) as (started, url), ThreadPoolExecutor(1) as clients:
        kept = clients.submit(httpx.post, f"{url}/v1/completions", json=MANY, timeout=60)
        wait_for(lambda: rows(url) > 0)
        started.send_signal(signal.SIGTERM)
        assert len(kept.result().json()["choices"]) == 500
        assert started.wait(60) == 0


def test_a_changed_bundle_is_unhealthy(copy_of: Callable[[Path], Path]) -> None:
    copy = copy_of(BUNDLE)
    with listening([PROGRAM, str(copy), "0"]) as (_, url):
        (copy / "bundle.json").write_text("{}")
        answer = httpx.get(f"{url}/health")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "bundle_changed")


@pytest.mark.parametrize("arguments", [[], [str(BUNDLE)], ["/nowhere", "0"], [str(BUNDLE), "x"], [str(BUNDLE), "-1"]])
def test_a_bad_argument_is_one_line(arguments: list[str]) -> None:
    result = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
