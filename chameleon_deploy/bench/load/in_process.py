"""A bundle in this process as a target: through the engine, or in static batches."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import cast

from chameleon_deploy import Engine, Runtime, Sampling
from chameleon_deploy.bench.load.requests import Request
from chameleon_deploy.bench.load.traffic import Record, Steps
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime.generation import Token
from chameleon_deploy.runtime.iteration import Iteration

LINGER = 0.005  # seconds that a static batch waits for more requests after the first


class EngineTarget:
    """The engine as a target."""

    def __init__(self, runtime: Runtime, rows: int, prefill_tokens: int, temperature: float = 0.0) -> None:
        self.engine = Engine(runtime, rows=rows, prefill_tokens=prefill_tokens, max_waiting=100_000,
                             observe=self._observe)  # fmt: skip
        self._sampling = Sampling(temperature=temperature, ignore_eos=True)
        self._steps = Steps()  # all of them, written by the engine's thread alone
        self._seen = Steps()

    def _observe(self, iteration: Iteration) -> None:
        before, seconds = self._steps, iteration.chunk + iteration.step
        self._steps = Steps(
            before.count + bool(iteration.rows), before.rows + iteration.rows, (before.seconds or 0) + seconds
        )

    async def complete(self, record: Record) -> None:
        request = record.request
        stream = self.engine.submit(
            prompts_of([request]), max_new_tokens=request.max_tokens, sampling=self._sampling, mode=mode_of(request)
        )
        try:
            async for token in stream:
                _note(record, token)
        finally:
            stream.cancel()

    async def steps(self) -> Steps | None:
        before, self._seen = self._seen, self._steps
        return self._seen.since(before)

    def close(self) -> None:
        self.engine.close(0)


class StaticTarget:
    """Batches of waiting requests in order of arrival, each generated to its end before the next one begins."""

    def __init__(self, runtime: Runtime, rows: int, temperature: float = 0.0) -> None:
        self._runtime, self._rows = runtime, rows
        self._sampling = Sampling(temperature=temperature, ignore_eos=True)
        self._waiting: SimpleQueue[_Ticket | None] = SimpleQueue()
        self._steps = Steps()  # all of them, written by the thread alone
        self._seen = Steps()
        self._thread = threading.Thread(target=self._run, name="static-batches", daemon=True)
        self._thread.start()

    async def complete(self, record: Record) -> None:
        ticket = _Ticket(record.request)
        self._waiting.put(ticket)
        while (token := await ticket.tokens.get()) is not None:
            if isinstance(token, ChameleonError):
                raise token
            _note(record, token)

    async def steps(self) -> Steps | None:
        before, self._seen = self._seen, self._steps
        return self._seen.since(before)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first, *self._others()]
            for mode in dict.fromkeys(mode_of(ticket.request) for ticket in batch):  # a static batch has one mode
                self._generate([ticket for ticket in batch if mode_of(ticket.request) == mode], mode)

    def _others(self) -> list[_Ticket]:
        others: list[_Ticket] = []
        end = time.perf_counter() + LINGER
        while len(others) < self._rows - 1:
            try:
                ticket = self._waiting.get(timeout=max(0.0, end - time.perf_counter()))
            except Empty:
                break
            if ticket is None:
                self._waiting.put(None)
                break
            others.append(ticket)
        return others

    def _generate(self, batch: list[_Ticket], mode: Mode | None) -> None:
        requests = [ticket.request for ticket in batch]
        try:
            tokens = self._runtime.stream(
                prompts_of(requests), max_new_tokens=[request.max_tokens for request in requests],
                sampling=self._sampling, mode=mode,
            )  # fmt: skip
            step: list[Token] = []
            for token in tokens:
                if step and token.row <= step[-1].row:  # the next step has begun
                    self._hand_out(batch, step)
                    step = []
                step.append(token)
            self._hand_out(batch, step)
        except ChameleonError as error:
            for ticket in batch:
                ticket.put([error, None])

    def _hand_out(self, batch: list[_Ticket], step: list[Token]) -> None:
        self._steps = Steps(self._steps.count + 1, self._steps.rows + len(step))
        for token in step:
            batch[token.row].put([token] if token.generation is None else [token, None])


class _Ticket:
    """A request that waits for its batch. `tokens` end with None."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: asyncio.Queue[Token | ChameleonError | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, items: Sequence[Token | ChameleonError | None]) -> None:
        self._loop.call_soon_threadsafe(self._put, items)

    def _put(self, items: Sequence[Token | ChameleonError | None]) -> None:
        for item in items:
            self.tokens.put_nowait(item)


def prompts_of(requests: Sequence[Request]) -> list[str] | list[list[int]]:
    """Return all texts, or all token ids."""
    return cast(list[str] | list[list[int]], [request.prompt for request in requests])


def mode_of(request: Request) -> Mode | None:
    return cast(Mode | None, request.model)


def _note(record: Record, token: Token) -> None:
    if token.token_id >= 0:
        record.arrivals.append(time.perf_counter())
    if token.generation is not None and token.generation.error is not None:
        raise token.generation.error
