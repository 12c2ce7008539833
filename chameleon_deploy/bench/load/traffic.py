"""Requests sent to a target, in closed loops or at given times, and the times of their tokens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chameleon_deploy.bench.load.requests import Request


@dataclass
class Record:
    """One request. Times are seconds of time.perf_counter.

    due         when it was to be sent; latencies count from here, so that a late client hides no waiting
    arrivals    of every piece of text, which is one token for most servers
    new_tokens  as the server counts them; the number of arrivals where it does not
    error       why it failed, "" where it did not
    """

    request: Request
    due: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    new_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Steps:
    """Steps of the decoder.

    rows     of all steps together
    seconds  in the decoder, prompts included; None where it is unknown
    """

    count: int = 0
    rows: int = 0
    seconds: float | None = None

    def since(self, before: Steps) -> Steps:
        seconds = None if self.seconds is None else self.seconds - (before.seconds or 0)
        return Steps(self.count - before.count, self.rows - before.rows, seconds)


class Target(Protocol):
    """Something that completes requests."""

    async def complete(self, record: Record) -> None:
        """Send the request and record its arrivals. An exception becomes the record's error."""

    async def steps(self) -> Steps | None:
        """Return the decoder's steps since the last call; None where they are unknown."""


async def closed_loop(target: Target, requests: Sequence[Request], streams: int, timeout: float) -> list[Record]:
    """Send the requests in `streams` closed loops: each sends its next request when its last one has ended."""
    waiting, records = deque(requests), []

    async def stream() -> None:
        while waiting:
            record = Record(waiting.popleft(), time.perf_counter())
            records.append(record)
            await _complete(target, record, timeout)

    await asyncio.gather(*(stream() for _ in range(streams)))
    return records


async def open_loop(
    target: Target, requests: Sequence[Request], arrivals: Sequence[float], timeout: float
) -> list[Record]:
    """Send every request at its time, in seconds from now, however many have not ended."""
    start = time.perf_counter()
    records = [Record(request, start + arrival) for request, arrival in zip(requests, arrivals, strict=True)]

    async def send(record: Record) -> None:
        await asyncio.sleep(max(0.0, record.due - time.perf_counter()))
        await _complete(target, record, timeout)

    await asyncio.gather(*map(send, records))
    return records


async def _complete(target: Target, record: Record, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout):
            await target.complete(record)
        if not record.arrivals:
            record.error = "no token came"
    except TimeoutError:
        record.error = f"no end within {timeout:g} s"
    except Exception as error:  # any exception is counted as this request's failure
        record.error = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    record.ended = time.perf_counter()
    record.new_tokens = record.new_tokens or len(record.arrivals)
