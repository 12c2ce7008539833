"""The cost of a token on its way out of a Ray cluster: processor time of Ray's proxy, the ingress and the replicas.

    python experiments/ingress_cost.py http://127.0.0.1:8000 --streams 32

The cluster runs on this machine and is otherwise idle. Every stream is read to its end, token by token where the
cluster sends them so: under load several tokens of a stream leave as one message.
"""

from __future__ import annotations

import argparse
import asyncio
import json

import httpx
import psutil

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    asyncio.run(_run(given.url, given.streams, given.tokens))  # connections, caches
    for _ in range(given.rounds):
        before = processor_seconds()
        tokens, pieces = asyncio.run(_run(given.url, given.streams, given.tokens))
        spent = {kind: seconds - before[kind] for kind, seconds in processor_seconds().items()}
        per_token = {kind: round(1e3 * seconds / tokens, 4) for kind, seconds in spent.items()}
        print(json.dumps({"tokens": tokens, "pieces": pieces, "ms_per_token": per_token}))


if __name__ == "__main__":
    main()
