"""What one tenant's flood of long prompts does to another's time to first token.

    python -m benchmarks.fairness BUNDLE --threads 2                          # serves the bundle itself
    python -m benchmarks.fairness --url http://127.0.0.1:8000 --flood-key K --key L   # a server that runs, or a cluster

The other tenant asks one short prompt after the other, alone and then under the flood. Each is allowed twice its time
alone and one chunk of the flood's prompts, as docs/serving.md says; a chunk's time is the mean of the server's metrics
under the flood alone. Beside it stands that of the shorter ones that are read while both are there.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import typer

from benchmarks.served import SECONDS, served
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.engine.tenants import SHORT_CALLS
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

WHOLE_CHUNKS = 16  # of the flood alone, whose mean is the time of a chunk


class Client:
    """One tenant of a server."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=SECONDS, limits=httpx.Limits())

    def model(self) -> tuple[int, int]:
        """Return the vocabulary's size, and the tokens of a row."""
        info = self._http.get("/tokenizer_info").raise_for_status().json()
        models = self._http.get("/v1/models").raise_for_status().json()["data"]
        return int(info["vocab_size"]), int(models[0]["max_model_len"])

    def first_token(self, prompt: list[int], max_tokens: int) -> float:
        """Return the seconds to the first token of an answer, which is read to its end."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "temperature": 0}
        start, first = time.perf_counter(), None
        with self._http.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for _ in answer.iter_text():
                first = first or time.perf_counter() - start
        if first is None:
            raise InputError("the server answered without a token")
        return first

    def chunks(self) -> tuple[float, float]:
        """Return the seconds of all chunks of prompts, and how many there were."""
        text = self._http.get("/metrics").text
        found = [re.search(rf"^chameleon_prefill_seconds_{part} (\S+)", text, re.M) for part in ("sum", "count")]
        seconds, count = (float(match[1]) if match else 0.0 for match in found)
        return seconds, count


def measure(client: Client, requests: int, tokens: int, vocab: int, chance: random.Random) -> list[float]:
    """Return the times to a first token of prompts that come one after the other."""
    prompts = [[chance.randrange(1, vocab) for _ in range(tokens)] for _ in range(requests)]
    return [client.first_token(prompt, max_tokens=4) for prompt in prompts]


@contextlib.contextmanager
def flood(client: Client, clients: int, tokens: int, vocab: int) -> Iterator[list[float]]:
    """Ask long prompts all the time, so many at once, none of which begins as another.  -> their times so far"""
    ended, times = threading.Event(), list[float]()

    def ask(number: int) -> None:
        chance = random.Random(number)
        while not ended.is_set():
            prompt = [chance.randrange(1, vocab) for _ in range(tokens)]
            with contextlib.suppress(httpx.HTTPStatusError):  # refused: it has filled its part of the queue
                times.append(client.first_token(prompt, max_tokens=16))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield times
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def wait_for_chunks(client: Client, count: int) -> tuple[float, float]:
    """Wait until the server has read so many more chunks.  -> as `Client.chunks`"""
    begun = client.chunks()
    while (now := client.chunks())[1] < begun[1] + count:
        time.sleep(0.1)
    return now


def compare(url: str, keys: tuple[str, str], requests: int, sizes: tuple[int, int], clients: int) -> Sheet:
    """Measure the tenant of the second key alone and under the flood of the first.

    sizes  tokens of its prompts, and of the flood's
    """
    flooding, other, chance = Client(url, keys[0]), Client(url, keys[1]), random.Random(0)
    vocab, longest = other.model()
    short, long = (min(size, longest - 16) for size in sizes)
    measure(other, 2, short, vocab, chance)
    alone = measure(other, requests, short, vocab, chance)
    with flood(flooding, clients, long, vocab) as times:
        # Chunks stay short for a while after the other tenant has been there.
        begun = wait_for_chunks(other, SHORT_CALLS + 1)
        before = wait_for_chunks(other, WHOLE_CHUNKS)
        flooded = measure(other, requests, short, vocab, chance)
        after = other.chunks()
    whole, chunk = (
        (end[0] - start[0]) / max(end[1] - start[1], 1) for start, end in ((begun, before), (before, after))
    )
    allowed = 2 * float(np.median(alone)) + whole
    within = sum(seconds <= allowed for seconds in flooded) / len(flooded)
    rows = [
        [name, f"{len(found)}", *(f"{1e3 * float(np.percentile(found, part)):.1f}" for part in (50, 90, 99))]
        for name, found in (("alone", alone), ("under the flood", flooded), ("the flood itself", times))
    ]
    caption = (
        f"prompts of {short} tokens, the flood's of {long}, {clients} at once; a chunk takes {1e3 * whole:.1f} ms, "
        f"and {1e3 * chunk:.1f} ms while the other tenant comes and goes; "
        f"{within:.0%} are within twice the median alone and one chunk, {1e3 * allowed:.1f} ms; "
        + ", ".join(describe_machine().values())
    )
    return Sheet(["time to first token, ms", "requests", "median", "p90", "p99"], rows, "Two tenants", caption)


def main(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle to serve; none with --url.")] = None,
    url: Annotated[str | None, typer.Option(help="A server that runs.")] = None,
    flood_key: Annotated[str, typer.Option(help="API key of the tenant that floods.")] = "sk-flood",
    key: Annotated[str, typer.Option(help="API key of the other tenant.")] = "sk-other",
    requests: Annotated[int, typer.Option(min=1, help="Of the other tenant, each time.")] = 100,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Of the other tenant's prompts.")] = 64,
    flood_tokens: Annotated[int, typer.Option(min=2, help="Of the flood's prompts.")] = 1024,
    clients: Annotated[int, typer.Option(min=1, help="Prompts that the flood has at once.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the bundle's server.")] = 2,
    capacity: Annotated[int, typer.Option(min=1, help="Tokens of a row of the bundle's server.")] = 1100,
) -> None:
    """Measure what a flood of one tenant does to another."""
    if (bundle is None) == (url is None):
        raise InputError("pass a bundle, or the --url of a server that runs")
    sizes = (prompt_tokens, flood_tokens)
    if url is not None:
        console.show(compare(url, (flood_key, key), requests, sizes, clients))
        return
    assert bundle is not None  # noqa: S101  (for the type checker)
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory) / "keys.json"
        keys.write_text(json.dumps({flood_key: "flood", key: "other"}))
        options = ["--api-keys", str(keys), "--prefix-cache-bytes", "0"]
        with served(bundle, Path(directory) / "log", threads, 8, capacity, options) as address:
            console.show(compare(address, (flood_key, key), requests, sizes, clients))


if __name__ == "__main__":
    console.run(main)
