"""Requests to a cluster that stream, and what became of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.ray_cluster import SECONDS

TOKENS = 60


@dataclass
class Answer:
    """A stream that was read to its end.

    events  with tokens, whose texts may be empty
    errors  the codes of its error events
    done    whether it ended as it should
    """

    text: str = ""
    events: int = 0
    errors: list[str] = field(default_factory=list)
    done: bool = False


def connect(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=httpx.Limits(max_connections=None))


async def stream(client: httpx.AsyncClient, prompt: str, answer: Answer | None = None) -> Answer:
    """Read one stream, into an answer that others may watch."""
    answer = answer or Answer()
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.done = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    answer.errors.append(event["error"]["code"])
                else:
                    answer.events += 1
                    answer.text += "".join(choice["text"] for choice in event["choices"])
    return answer
