"""Mixed traffic of 64 clients: each request is answered as if it were alone, and nothing is left over.

CHAMELEON_REQUESTS sets the number of requests; 10,000 take about ten minutes. From LONG_RUN on memory is looked at too.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import statistics
from collections.abc import Iterator
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
CLIENTS = 64
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


async def send(url: str, all_asked: list[Asked], process_id: int) -> list[int]:
    """Send everything.  -> resident memory of the server after every hundredth part"""
    waiting, memory, chance = list(reversed(all_asked)), list[int](), random.Random(13)

    async def work(client: httpx.AsyncClient) -> None:
        while waiting:
            await ask(client, waiting.pop(), chance)
            if len(waiting) % max(1, len(all_asked) // 100) == 0:
                memory.append(status(process_id, "VmRSS"))

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=CLIENTS)) as client:
        await asyncio.gather(*(work(client) for _ in range(CLIENTS)))
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


@pytest.mark.timeout(3600)
def test_mixed_traffic_is_answered_as_serial_requests_and_leaves_nothing(bundle: Path, runtime: Runtime) -> None:
    all_asked = requests(REQUESTS)
    with ThreadPoolExecutor(1) as log, process(bundle, "--max-waiting", "2000") as (server, url):
        assert server.stderr
        log.submit(server.stderr.read)  # else it would fill the pipe
        with silent_connections(url):  # pools of threads and buffers fill
            asyncio.run(send(url, requests(CLIENTS), server.pid))
        wait_for(lambda: rows_present(url) == 0)
        before = status(server.pid, "Threads"), open_files(server.pid)
        with silent_connections(url):
            memory = asyncio.run(send(url, all_asked, server.pid))
        wait_for(lambda: rows_present(url) == 0)
        wait_for(lambda: (status(server.pid, "Threads"), open_files(server.pid)) <= before, seconds=20)
        server.terminate()
        assert server.wait(60) == 0
    if len(all_asked) >= LONG_RUN:
        second_half = memory[len(memory) // 2 :]
        first, last = (statistics.median(part) for part in (second_half[:10], second_half[-10:]))
        assert abs(last / first - 1) < 0.02, memory
    answered = [asked for asked in all_asked if not asked.is_cancelled]
    assert [asked.body for asked in answered if differs(runtime, asked)] == []
    decided = next(asked for asked in answered if asked.body["temperature"] > 0)
    decided.texts[-1] += "?"
    assert differs(runtime, decided)
