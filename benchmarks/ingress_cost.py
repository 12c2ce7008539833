"""The cost of a token on its way out of a Ray cluster: processor time of Ray's proxy, the ingress and the replicas.

    python -m benchmarks.ingress_cost http://127.0.0.1:8000 --streams 32

The cluster runs on this machine and is otherwise idle. Every stream is read to its end, token by token where the
cluster sends them so: under load several tokens of a stream leave as one message.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import httpx
import psutil
import typer

from chameleon_deploy.terminal import console

PROCESSES = {"proxy": "ray::ProxyActor", "ingress": ":Ingress", "replicas": ":Replica"}


def processor_seconds() -> dict[str, float]:
    """Return the processor time that each kind of process has used so far."""
    used = dict.fromkeys(PROCESSES, 0.0)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        title = " ".join(process.info["cmdline"] or ())
        for kind, mark in PROCESSES.items():
            if title.startswith("ray::") and mark in title:
                used[kind] += process.info["cpu_times"].user + process.info["cpu_times"].system
    return used


async def _stream(client: httpx.AsyncClient, number: int, tokens: int) -> tuple[int, int]:
    """Return how many tokens came, in how many pieces."""
    body = {"prompt": f"Number {number}", "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    count = pieces = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for piece in response.aiter_raw():
            pieces += 1
            count += piece.count(b'"choices":[{')
    return count, pieces


async def _run(url: str, streams: int, tokens: int) -> tuple[int, int]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        results = await asyncio.gather(*(_stream(client, number, tokens) for number in range(streams)))
    return sum(count for count, _ in results), sum(pieces for _, pieces in results)


def main(
    url: Annotated[str, typer.Argument(help="The cluster's ingress.")],
    streams: Annotated[int, typer.Option(min=1, help="Streams at a time.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each stream.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Runs; each prints a line of JSON.")] = 5,
) -> None:
    """Measure the processor time of a streamed token in proxy, ingress and replicas."""
    asyncio.run(_run(url, streams, tokens))  # connections, caches
    for _ in range(rounds):
        before = processor_seconds()
        came, pieces = asyncio.run(_run(url, streams, tokens))
        spent = {kind: seconds - before[kind] for kind, seconds in processor_seconds().items()}
        per_token = {kind: round(1e3 * seconds / came, 4) for kind, seconds in spent.items()}
        print(json.dumps({"tokens": came, "pieces": pieces, "ms_per_token": per_token}))


if __name__ == "__main__":
    console.run(main)
