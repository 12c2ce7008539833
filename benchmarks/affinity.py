"""What routing by cluster or by prefix is worth on a cluster that runs: factor sets and rows of a step, prompt tokens
found in prefix caches, time to first token, and tokens per second.

    serve run chameleon_deploy.serve.ray:app bundle=BUNDLE replicas=2 routing=cluster      # and again with routing=load
    python -m benchmarks.affinity http://127.0.0.1:8000 --bundle BUNDLE

Prompts are Python's own texts, of clusters that follow Zipf's law; with --beginnings random tokens after one of so many
beginnings, by the same law, for routing=prefix. Each stream sends its next request when its last one has ended. The
metrics of the replicas tell the rest.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Annotated, TypeVar

import httpx
import numpy as np
import typer

import chameleon_deploy
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.terminal import console

ZIPF = 1.2
FIRST = "chameleon_time_to_first_token_seconds"
OTHER_TOKENS = 16  # after a beginning


Prompt = str | list[int]
T = TypeVar("T")


def draw_of_clusters(bundle: str, count: int, characters: int) -> list[Prompt]:
    """Return prompts whose clusters are drawn by Zipf's law; the same for every routing."""
    runtime = chameleon_deploy.load(bundle, threads=1)
    texts = [text[:characters] for kind in KINDS for text in python_texts(kind, 200)]
    of_cluster: dict[int, list[str]] = {}
    for text, cluster_id in zip(texts, runtime.embed(runtime.encode(texts))[1].tolist(), strict=True):
        of_cluster.setdefault(cluster_id, []).append(text)
    return [random.choice(group) for group in by_zipf(list(of_cluster.values()), count)]


def draw_of_beginnings(vocab_size: int, count: int, beginnings: int, tokens: int) -> list[Prompt]:
    """Return prompts of one of so many beginnings of so many tokens each, and OTHER_TOKENS of their own."""
    ids = np.random.default_rng(0)
    begun = [ids.integers(1, vocab_size, tokens).tolist() for _ in range(beginnings)]
    return [[*beginning, *ids.integers(1, vocab_size, OTHER_TOKENS).tolist()] for beginning in by_zipf(begun, count)]


def by_zipf(groups: Sequence[T], count: int) -> list[T]:
    """Return so many of the groups, each as often as Zipf's law says."""
    random.seed(0)
    return random.choices(groups, [1 / (rank + 1) ** ZIPF for rank in range(len(groups))], k=count)


async def load(url: str, prompts: list[Prompt], streams: int, tokens: int) -> None:
    """Complete all prompts."""
    left = list(reversed(prompts))

    async def work(client: httpx.AsyncClient) -> None:
        while left:
            body = {"prompt": left.pop(), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            (await client.post("/v1/completions", json=body)).raise_for_status()

    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(work(client) for _ in range(streams)))


def metrics(url: str) -> dict[str, float]:
    """Return the samples without labels, by name."""
    lines = [line.split() for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines()]
    return {words[0]: float(words[1]) for words in lines if len(words) == 2}


def main(
    url: Annotated[str, typer.Argument(help="The cluster's ingress.")],
    bundle: Annotated[str, typer.Option(help="What the cluster serves, to find each prompt's cluster.")],
    streams: Annotated[int, typer.Option(min=1, help="Streams of the closed loop.")] = 16,
    requests: Annotated[int, typer.Option(min=1, help="Requests.")] = 96,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after each prompt.")] = 64,
    characters: Annotated[int, typer.Option(min=1, help="Characters of a prompt.")] = 300,
    beginnings: Annotated[int, typer.Option(min=0, help="Of prompts of random tokens; 0: prompts of clusters.")] = 0,
    beginning_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each beginning.")] = 512,
) -> None:
    """Measure rows, factor sets, cached tokens and tokens per second of a cluster under load."""
    if beginnings:
        vocab_size = chameleon_deploy.load(bundle, threads=1).manifest.model.vocab_size
        prompts = draw_of_beginnings(vocab_size, requests, beginnings, beginning_tokens)
    else:
        prompts = draw_of_clusters(bundle, requests, characters)
    asyncio.run(load(url, prompts[:streams], streams, tokens))  # connections, caches
    before, begin = metrics(url), time.perf_counter()
    asyncio.run(load(url, prompts, streams, tokens))
    seconds = time.perf_counter() - begin
    grown = {name: value - before.get(name, 0) for name, value in metrics(url).items()}
    steps = grown["chameleon_batch_rows_count"]
    print(json.dumps({
        "tokens_per_second": round(requests * tokens / seconds, 1),
        "rows_per_step": round(grown["chameleon_batch_rows_sum"] / steps, 2),
        "factor_sets_per_step": round(grown["chameleon_batch_factor_sets_sum"] / steps, 2),
        "step_ms": round(1e3 * grown["chameleon_step_seconds_sum"] / steps, 2),
        "first_token_s": round(grown[f"{FIRST}_sum"] / grown[f"{FIRST}_count"], 3),
        "cached_share": round(
            grown["chameleon_prefix_cache_hits_total"] / max(1, grown["chameleon_prefix_cache_queries_total"]), 3
        ),
    }))  # fmt: skip


if __name__ == "__main__":
    console.run(main)
