"""What a conversation costs beside a completion of the same tokens, over HTTP.

    python -m benchmarks.chat_cost BUNDLE --threads 2 --server llama.cpp=http://127.0.0.1:8080

Both ask for the same token ids and give the same ones back; chat renders a template, encodes its text and writes
another answer. Their order alternates; each figure is the median of the rounds, and the ratio that of their ratios.
A `--server` runs already: it has the same conversations, all at once, each with as many new tokens.
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

from benchmarks.humaneval import named
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


def beside(client: httpx.Client, server: httpx.Client, rounds: int, new_tokens: int) -> tuple[list[float], list[float]]:
    """Return the tokens per second of a server of ours and of another, which have the same conversations in turns.

    The first of the rounds, which warms up, is left out. Raises CheckFailedError for an answer of another length.
    """
    rates: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            http = (client, server)[which]
            # Another number in each round, so that no server finds the whole prompt in its cache.
            asked = [
                {"messages": conversation(f"{topic}, {number}"), "max_tokens": new_tokens, "temperature": 0,
                 "ignore_eos": True} for topic in TOPICS
            ]  # fmt: skip
            start = time.perf_counter()
            with ThreadPoolExecutor(len(asked)) as pool:
                answers = list(pool.map(lambda body: http.post(CHAT, json=body).raise_for_status().json(), asked))  # noqa: B023
            rates[which].append(new_tokens * len(asked) / (time.perf_counter() - start))
            lengths = {answer["usage"]["completion_tokens"] for answer in answers}
            if lengths != {new_tokens}:
                raise CheckFailedError(f"{http.base_url} answered {sorted(lengths)} tokens, not {new_tokens}")
    return rates[0][1:], rates[1][1:]


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with a chat template.")],
    server: Annotated[list[str] | None, typer.Option(metavar="NAME=URL", help="A running server; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs per ratio.")] = 9,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the server.")] = 2,
    capacity: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 1024,
) -> None:
    """Time chat beside completions, one and eight at once, whole and as a stream."""
    rows, others = [], []
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
            for name, address in named("--server", server):
                with httpx.Client(base_url=address, timeout=SECONDS) as other:
                    ours, theirs = beside(client, other, rounds, new_tokens)
                ratios = [one / another for one, another in zip(ours, theirs, strict=True)]
                rates = [f"{statistics.median(each):.1f}" for each in (ours, theirs)]
                others.append(
                    [name, *rates, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
                )
    console.show(Sheet(["at once", "stream", "completions, ms", "chat, ms", "ratio"], rows))
    if others:
        title = f"{len(TOPICS)} conversations at once, {new_tokens} new tokens each"
        console.show(Sheet(["beside", "ours, tokens/s", "theirs, tokens/s", "ratio"], others, title))


if __name__ == "__main__":
    console.run(main)
