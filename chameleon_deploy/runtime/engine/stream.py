"""The tokens of one submit, passed from the engine's thread to a reading thread or coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime.engine.iteration import FinishedRow
from chameleon_deploy.runtime.generation import Generation, Token


@dataclass(frozen=True)
class Cohort:
    """The prompts whose embeddings are averaged, in the modes cohort and tenant.

    id    counts the cohorts of an engine
    size  number of its prompts, over all clusters
    """

    id: int
    size: int


class Stream:
    """The tokens of one `Engine.submit`. Row i * n + k is continuation k of prompt i.

    Read it with `for`, `async for`, `result()` or `await stream`; one reader at a time. The engine never waits for a
    reader. The last Token of every row holds its Generation. If that Token has token_id -1, the row ended without a new
    token: cancelled, past its deadline, or failed.

    prompts      token ids of each prompt
    cluster_ids  nearest centroid of each prompt; -1 in a bundle without centroids
    mode         adaptation mode
    n            continuations per prompt
    cohort       set before the first token in the modes cohort and tenant, else None
    cached_tokens  of each prompt, tokens that were found in the prefix cache; set before the first token
    cancelled    whether `cancel` was called
    finished     the records of the rows that have ended
    """

    def __init__(self, prompts: Sequence[Sequence[int]], cluster_ids: Sequence[int], mode: Mode, n: int) -> None:
        self.prompts, self.cluster_ids, self.mode, self.n = prompts, cluster_ids, mode, n
        self.cohort: Cohort | None = None
        self.cached_tokens = [0] * len(prompts)
        self.cancelled = False
        self.finished = list[FinishedRow]()
        self._tokens: SimpleQueue[Token | None] = SimpleQueue()  # None ends it
        self._generations: dict[int, Generation] = {}
        self._done = threading.Event()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Future[None], bool] | None = None

    def cancel(self) -> None:
        """End all rows of this submit within one iteration of the engine; they finish with reason "cancelled"."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Return whether every row has ended."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> list[Generation]:
        """Wait until every row has ended.

        timeout  seconds

        Raises TimeoutError. A row that failed has finish_reason "error", and its Generation holds the error.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"the generation has not ended within {timeout} seconds")
        return [self._generations[row] for row in range(len(self._generations))]

    def __iter__(self) -> Iterator[Token]:
        return self

    def __next__(self) -> Token:
        token = self._tokens.get()
        if token is None:
            self._tokens.put(None)  # for a later call
            raise StopIteration
        return token

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        while True:
            try:
                token = self._tokens.get_nowait()
            except Empty:
                await self._notified(at_end=False)
                continue
            if token is None:
                self._tokens.put(None)
                raise StopAsyncIteration
            return token

    def __await__(self) -> Generator[Any, None, list[Generation]]:
        while not self.done:
            yield from self._notified(at_end=True).__await__()
        return self.result()

    async def _notified(self, at_end: bool) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._reader = (loop, future, at_end)
        # The engine first puts tokens and then looks for a reader, so all tokens put before it saw this reader are
        # here.
        if self.done or not (at_end or self._tokens.empty()):
            return
        await future

    def _deliver(self, tokens: Iterable[Token]) -> None:
        """Called by the engine's thread only, followed by `notify_readers`."""
        for token in tokens:
            if token.generation is not None:
                self._generations[token.row] = token.generation
            self._tokens.put(token)
        if len(self._generations) == len(self.prompts) * self.n:
            self._tokens.put(None)
            self._done.set()

    def _take_reader(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None:
        """Return the coroutine to wake if one waits for the delivered tokens."""
        if (reader := self._reader) is None or (reader[2] and not self.done):
            return None
        self._reader = None
        return reader[:2]


def deliver(tokens: dict[Stream, list[Token]]) -> None:
    """Deliver the tokens of one iteration, with one wake-up per event loop."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream, its_tokens in tokens.items():
        stream._deliver(its_tokens)
        if (reader := stream._take_reader()) is not None:
            futures.setdefault(reader[0], []).append(reader[1])
    for loop, waiting in futures.items():
        try:
            loop.call_soon_threadsafe(_wake, waiting)
        except RuntimeError:  # the loop is closed and has no reader any more
            continue


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # a cancelled coroutine's future is done
            future.set_result(None)
