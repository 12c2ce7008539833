"""Mixed traffic of 64 clients, good and bad: none harms another, and nothing is left over.

Each good request is answered as if it were alone, and /health all the time. CHAMELEON_REQUESTS sets the number of
requests; from LONG_RUN on memory is looked at too, and a sample of the answers is compared.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.runtime import Generation
from tests.rows import random_rows
from tests.serving import process, wait_for

REQUESTS = int(os.environ.get("CHAMELEON_REQUESTS", "300"))
LONG_RUN = 5000
COMPARED = 5000  # answers of a long run
CLIENTS = 64
POOL = min(32, (os.cpu_count() or 1) + 4)  # threads of asyncio that read large bodies; they stay
BAD = 0.25  # of the requests
ANSWER_SECONDS = 120  # for an answer, behind those of 63 other clients
HEALTH_SECONDS = 5  # for an answer of /health, on a machine with other work
COMPLETIONS = "/v1/completions"
GAP = 1e-4  # between the two most probable tokens, below which batching may change a greedy choice


@dataclass
class Asked:
    """A request, and the texts of its answer."""

    body: dict[str, Any]
    is_cancelled: bool
    texts: list[str] = field(default_factory=list)


def requests(count: int) -> list[Asked]:
    chance = random.Random(11)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0}, {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9}, {"temperature": 1.0, "frequency_penalty": 0.5},
    ]  # fmt: skip
    return [
        Asked(
            {
                "prompt": ids,
                "mode": chance.choice(["none", "centroid", "request"]),
                "max_tokens": chance.randint(1, 24),
                **chance.choice(samplings),
                "n": chance.choice([1, 1, 1, 2, 3]),
                "stop": chance.choice([None, None, ["e"], ["th", "="]]),
                "stream": chance.random() < 0.5,
                "seed": number,
            },
            chance.random() < 0.1,
        )
        for number, ids in enumerate(random_rows(12, count, 80))
    ]


def alone(runtime: Runtime, body: dict[str, Any]) -> list[Generation]:
    """What the runtime gives for a request that has it to itself."""
    names = ("temperature", "top_k", "top_p", "frequency_penalty", "seed")
    fields = {name: body[name] for name in names if name in body}
    sampling = Sampling(**fields, stop=body["stop"] or (), logprobs=2)
    prompts = [body["prompt"]] * body["n"]
    return runtime.generate(prompts, max_new_tokens=body["max_tokens"], sampling=sampling, mode=body["mode"])


def differs(runtime: Runtime, asked: Asked) -> bool:
    """Whether a text is not what the request gives alone, where every choice was clear."""
    return any(
        text != expected.text and is_clear(expected, asked.body["temperature"])
        for text, expected in zip(asked.texts, alone(runtime, asked.body), strict=True)
    )


def is_clear(generation: Generation, temperature: float) -> bool:
    """A choice by a random number is, but for one in about a million."""
    tops = generation.top_logprobs or []
    return temperature > 0 or all(len(top) < 2 or top[0][1] - top[1][1] > GAP for top in tops)


async def ask(client: httpx.AsyncClient, asked: Asked, chance: random.Random) -> None:
    if asked.is_cancelled:
        await cancel(client, asked, chance)
        return
    answer = await client.post("/v1/completions", json=asked.body)
    assert answer.status_code == 200, answer.text
    if not asked.body["stream"]:
        asked.texts = [choice["text"] for choice in answer.json()["choices"]]
        return
    *events, done = answer.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    asked.texts = [""] * asked.body["n"]
    for event in events:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            asked.texts[choice["index"]] += choice["text"]


async def cancel(client: httpx.AsyncClient, asked: Asked, chance: random.Random) -> None:
    """Leave in the middle of an answer, or before it."""
    try:
        async with asyncio.timeout(chance.uniform(0, 0.3)):
            async with client.stream("POST", "/v1/completions", json=asked.body | {"stream": True}) as answer:
                pieces = chance.randint(0, 5)
                async for _ in answer.aiter_bytes():
                    if (pieces := pieces - 1) < 0:
                        return
    except TimeoutError:
        return


async def harm(port: int, chance: random.Random) -> None:
    """Be one of the clients that once stopped others."""
    harmful = chance.choice(HARMFUL)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            for part in harmful.parts(chance):
                writer.write(part)
                await writer.drain()
            if harmful.status is None:  # leave in the middle
                await asyncio.sleep(chance.uniform(0, 0.3))
                return
            line = (await reader.readline()).decode()
            assert f" {harmful.status} " in line, (harmful.name, line)
            await reader.read(65536)
    except ConnectionError:  # refused while it still sends
        assert harmful.status in (None, 400), harmful.name
    except TimeoutError:
        pytest.fail(f"{harmful.name}: not answered within {ANSWER_SECONDS} seconds")
    finally:
        writer.transport.abort()


@dataclass(frozen=True)
class Harmful:
    """A kind of bad client.

    parts   what it sends
    status  of the answer that it must get; None where it leaves without one
    """

    name: str
    parts: Callable[[random.Random], Iterable[bytes]]
    status: int | None


def post(path: str, **body: Any) -> bytes:
    raw = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


def in_chunks_of_one_byte(chance: random.Random) -> Iterator[bytes]:
    body = json.dumps({"prompt": "The river", "max_tokens": 2, "user": "a" * chance.randint(0, 20_000)})
    yield CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body.encode()) + b"0\r\n\r\n"


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
TEXTS = ["The river runs through the town."] * 40
HARMFUL = [
    Harmful("a stop string that is too long", lambda _: [post(COMPLETIONS, prompt="a", stop="a" * 350_000)], 400),
    Harmful("stop strings at the limit", lambda _: [post(COMPLETIONS, prompt="a", stop=["a" * 1023 + "b"] * 4)], 200),
    Harmful("stop tokens", lambda _: [post(COMPLETIONS, prompt="a", stop_token_ids=list(range(300)) * 300)], 400),
    Harmful("biases", lambda _: [post(COMPLETIONS, prompt="a", logit_bias={str(i): 1 for i in range(9000)})], 400),
    Harmful("many biases", lambda _: [post(COMPLETIONS, prompt="a", logit_bias={str(i): 1 for i in range(320)})], 200),
    Harmful("a model of a long name", lambda _: [post(COMPLETIONS, prompt="a", model="m" * 10**6)], 404),
    Harmful("who leaves scores", lambda _: [post("/v1/score", input=TEXTS)], None),
    Harmful("who leaves an echo", lambda _: [post(COMPLETIONS, prompt=TEXTS, echo=True, logprobs=1)], None),
    Harmful("who leaves many rows", lambda _: [post(COMPLETIONS, prompt="a", n=128, max_tokens=60)], None),
    Harmful("who says nothing", lambda _: [], None),
    Harmful("half a header", lambda _: [b"POST /v1/completions HTTP/1.1\r\nContent-Le"], None),
    Harmful("half a body", lambda _: [post(COMPLETIONS, prompt="a" * 300_000)[:-1]], None),
    Harmful("chunks of one byte", in_chunks_of_one_byte, 200),
    Harmful("extensions of chunks", lambda _: [CHUNKED, *[b"1;" + b"a" * 9000 + b"\r\na\r\n"] * 30], 400),
    Harmful("a large header", lambda _: [b"GET /health HTTP/1.1\r\nHost: ", b"a" * 500_000], 400),
    Harmful("a line of the log", lambda _: [b"GET /x%0A2026-01-01%20INFO%1b[31m HTTP/1.1\r\nHost: a\r\n\r\n"], 404),
    Harmful("no JSON", lambda _: [b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{]"], 400),
    Harmful("no HTTP", lambda chance: [chance.randbytes(300)], None),
]  # fmt: skip


async def watch_health(client: httpx.AsyncClient, ended: asyncio.Event) -> float:
    """Ask for /health until the others have ended.  -> the longest time of an answer, in seconds"""
    longest = 0.0
    while not ended.is_set():
        started = time.monotonic()
        assert (await client.get("/health")).status_code == 200
        longest = max(longest, time.monotonic() - started)
        await asyncio.sleep(0.2)
    return longest


async def send(url: str, all_asked: list[Asked], process_id: int) -> list[int]:
    """Send everything.  -> resident memory of the server after every hundredth part"""
    waiting, memory, chance = list(reversed(all_asked)), list[int](), random.Random(13)
    port = int(url.rpartition(":")[2])

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            asked = waiting.pop()
            while chance.random() < BAD:
                await harm(port, chance)
            await ask(client, asked, chance)
            if len(waiting) % max(1, len(all_asked) // 100) == 0:
                memory.append(status(process_id, "VmRSS"))

    # Each request has a connection of its own: the server may close an idle one just as it is used again.
    limits = httpx.Limits(max_connections=CLIENTS + 1, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits) as client:
        ended = asyncio.Event()
        health = asyncio.create_task(watch_health(client, ended))
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
        ended.set()
        assert await health < HEALTH_SECONDS
    return memory


def status(process_id: int, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{process_id}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def open_files(process_id: int) -> int:
    return len(list(Path(f"/proc/{process_id}/fd").iterdir()))


@contextmanager
def silent_connections(url: str) -> Iterator[None]:
    """250 clients that send nothing, and 250 that read nothing."""
    port = int(url.rpartition(":")[2])
    body = json.dumps({"prompt": "The river", "stream": True, "max_tokens": 3}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as opened:
        for number in range(500):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            if number % 2:
                client.sendall(request)
        yield


def rows_present(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    counts = re.findall(r"^chameleon_num_requests_(?:running|waiting) ([\d.]+)", text, re.MULTILINE)
    assert len(counts) == 2
    return sum(map(float, counts))


@pytest.mark.timeout(max(600, REQUESTS // 5))
def test_mixed_traffic_is_answered_as_serial_requests_and_leaves_nothing(bundle: Path, runtime: Runtime) -> None:
    all_asked = requests(round(REQUESTS * (1 - BAD)))  # the others are bad
    with ThreadPoolExecutor(1) as log, process(bundle, "--max-waiting", "2000") as (server, url):
        assert server.stderr
        log.submit(server.stderr.read)  # else it would fill the pipe
        with silent_connections(url):  # pools of threads and buffers fill
            asyncio.run(send(url, requests(CLIENTS), server.pid))
        wait_for(lambda: rows_present(url) == 0)
        threads, files = status(server.pid, "Threads"), open_files(server.pid)
        with silent_connections(url):
            memory = asyncio.run(send(url, all_asked, server.pid))
        wait_for(lambda: rows_present(url) == 0)
        wait_for(
            lambda: status(server.pid, "Threads") <= threads + POOL and open_files(server.pid) <= files, seconds=20
        )
        server.terminate()
        assert server.wait(60) == 0
    if len(all_asked) >= LONG_RUN:
        second_half = memory[len(memory) // 2 :]
        first, last = (statistics.median(part) for part in (second_half[:10], second_half[-10:]))
        assert abs(last / first - 1) < 0.02, memory
    answered = [asked for asked in all_asked if not asked.is_cancelled]
    answered = random.Random(14).sample(answered, min(COMPARED, len(answered)))
    assert [asked.body for asked in answered if differs(runtime, asked)] == []
    decided = next(asked for asked in answered if asked.body["temperature"] > 0)
    decided.texts[-1] += "?"
    assert differs(runtime, decided)
