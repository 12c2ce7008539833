"""What a conversation costs beside a completion of the same tokens, over HTTP.

    python -m benchmarks.chat_cost BUNDLE --threads 2

Both ask for the same token ids and give the same ones back; chat renders a template, encodes its text and writes
another answer. Their order alternates; each figure is the median of the rounds, and the ratio that of their ratios.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.served import SECONDS, served
from chameleon_deploy.errors import CheckFailedError
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TOPICS = ("rivers", "bridges", "trains", "museums", "bread", "clouds", "islands", "letters")


def conversation(topic: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You are a helpful assistant. Answer in full sentences."},
        {"role": "user", "content": f"Tell me something about {topic}."},
        {"role": "assistant", "content": f"There is much to tell about {topic}: where they come from, and what for."},
        {"role": "user", "content": "Go on, with more detail, and give an example."},
    ]


def bodies(client: httpx.Client, new_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Return requests of both kinds that ask for the same tokens. Raises CheckFailedError where these differ."""
    common = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    found: dict[str, list[dict[str, Any]]] = {CHAT: [], COMPLETION: []}
    for topic in TOPICS:
        chat = {"messages": conversation(topic), **common}
        answer = _choice(client, CHAT, {**chat, "return_token_ids": True})
        completion = {"prompt": answer["prompt_token_ids"], **common}
        if _choice(client, COMPLETION, {**completion, "return_token_ids": True})["token_ids"] != answer["token_ids"]:
            raise CheckFailedError(f"chat and completions answer otherwise about {topic}")
        found[CHAT].append(chat)
        found[COMPLETION].append(completion)
    return found


def _choice(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = client.post(path, json=body).raise_for_status().json()["choices"][0]
    return choice


def seconds(client: httpx.Client, path: str, asked: Sequence[Mapping[str, Any]], stream: bool) -> float:
    """Ask all at once, and return the seconds until the last has its whole answer."""

    def one(body: Mapping[str, Any]) -> None:
        with client.stream("POST", path, json={**body, "stream": stream}) as answer:
            answer.raise_for_status().read()

    with ThreadPoolExecutor(len(asked)) as pool:
        start = time.perf_counter()
        list(pool.map(one, asked))
        return time.perf_counter() - start


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a chat template.")],
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs per ratio.")] = 9,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the server.")] = 2,
    capacity: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 1024,
) -> None:
    """Time chat beside completions, one and eight at once, whole and as a stream."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with (
            served(bundle, log, threads, len(TOPICS), capacity) as url,
            httpx.Client(base_url=url, timeout=SECONDS) as client,
        ):
            asked = bodies(client, new_tokens)
            for at_once in (1, len(TOPICS)):
                for stream in (False, True):
                    times: dict[str, list[float]] = {CHAT: [], COMPLETION: []}
                    for i in range(rounds):
                        for path in (CHAT, COMPLETION) if i % 2 else (COMPLETION, CHAT):
                            times[path].append(seconds(client, path, asked[path][:at_once], stream))
                    ratios = [chat / completion for chat, completion in zip(*times.values(), strict=True)]
                    medians = [f"{1000 * statistics.median(times[path]):.0f}" for path in (COMPLETION, CHAT)]
                    rows.append([str(at_once), "yes" if stream else "no", *medians, f"{statistics.median(ratios):.3f}"])
    console.show(Sheet(["at once", "stream", "completions, ms", "chat, ms", "ratio"], rows))


if __name__ == "__main__":
    console.run(main)
