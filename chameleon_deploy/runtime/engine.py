"""Continuous batching: one thread drives the decoder, any number of threads and coroutines submit to it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from chameleon_deploy.bundle import Mode
from chameleon_deploy.errors import ChameleonError, ClosedError, InputError, QueueFullError
from chameleon_deploy.runtime.adaptation import Factors
from chameleon_deploy.runtime.generation import FinishReason, Generation, Token
from chameleon_deploy.runtime.inputs import Texts
from chameleon_deploy.runtime.runtime import Runtime
from chameleon_deploy.runtime.sampling import Sampling
from chameleon_deploy.runtime.stream import Stream, deliver


@dataclass(frozen=True)
class FinishedRow:
    """A row that ended in an iteration.

    prompt_tokens, new_tokens  counts
    seconds                    from submit to its end
    """

    mode: Mode
    cluster_id: int
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True)
class Iteration:
    """What one iteration of the engine did, for metrics.

    step_seconds         the decoder's step, 0 where no row was ready
    chunk_seconds        reading the chunk of a prompt, 0 where none was read
    chunk_tokens         prompt tokens read
    rows                 in the step; each got one token
    factor_sets          resident during the step
    factor_set_hits      rows admitted whose factor set was resident already
    queue_seconds        of every row admitted: from submit to admission
    first_token_seconds  of every row's first token: since submit
    token_seconds        of every later token: since the row's token before it
    finished             rows that ended, for whatever reason
    """

    step_seconds: float
    chunk_seconds: float
    chunk_tokens: int
    rows: int
    factor_sets: int
    factor_set_hits: int
    queue_seconds: list[float]
    first_token_seconds: list[float]
    token_seconds: list[float]
    finished: list[FinishedRow]


@dataclass(frozen=True)
class Stats:
    """The state of an engine at one moment.

    running, waiting  rows that hold a place in the batch, and rows that wait for one
    rows              places in the batch
    cached_tokens     tokens in the key-value cache, of cache_capacity
    factor_sets       resident
    """

    running: int
    waiting: int
    rows: int
    cached_tokens: int
    cache_capacity: int
    factor_sets: int


class Engine:
    """Generate for many callers at once on one runtime. See `submit`.

    runtime   what it drives; other threads may go on using it, each call then takes its share of the processor
    batching  "continuous", where rows join and leave a running batch; "static" on a decoder that cannot do that: a
              batch of waiting rows runs to its end
    """

    runtime: Runtime
    batching: Literal["continuous", "static"]

    def __init__(
        self,
        runtime: Runtime,
        *,
        rows: int = 8,
        max_waiting: int = 256,
        prefill_tokens: int = 64,
        max_factor_sets: int | None = None,
        cohort_window_ms: float = 0,
        capacity: int | None = None,
        observe: Callable[[Iteration], None] | None = None,
    ) -> None:
        """
        rows              places in the batch
        max_waiting       rows that may wait for a place; a submit beyond that is a QueueFullError
        prefill_tokens    of a prompt that are read between two steps of the running rows
        max_factor_sets   different factor sets in the batch at a time; None means as many as rows
        cohort_window_ms  how long a submit in mode cohort, or in mode tenant of the same tenant, waits for others
                          that join its cohort; 0 means that a cohort is the prompts of one submit
        capacity          tokens per row that the key-value cache holds; None means the model's positions
        observe           called by the engine's thread after every iteration; must be quick and not raise

        Raises InputError.
        """
        for name, value in (("rows", rows), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.runtime, self.rows, self.max_waiting = runtime, rows, max_waiting
        self.batching = "static"
        self._open, self._present, self._lock = True, 0, threading.Lock()
        self._commands: queue.SimpleQueue[tuple[Stream, Callable[[], list[Generation]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="chameleon-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int | Sequence[int] = 20,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (immutable)
        mode: Mode | None = None,
        tenant: Hashable | None = None,
        factors: Factors | None = None,
        n: int = 1,
        deadline: float | None = None,
        adapt_tokens: int | None = None,
    ) -> Stream:
        """Queue every prompt. Returns at once; safe to call from any thread.

        prompts         texts, or lists of token ids
        max_new_tokens  at least 1, one number or one per prompt; the capacity of a row bounds it too
        sampling        one Sampling for all, where row i draws from random stream i, or one per prompt, where its
                        continuation k draws from stream k whatever the place of the prompt
        mode            adaptation mode; None takes the runtime's
        tenant          mode tenant: whom the prompts belong to, any hashable value
        factors         mode static: a caller's own, see `Runtime.adapt`
        n               continuations per prompt
        deadline        seconds from now, after which rows that have not ended finish with reason "deadline"
        adapt_tokens    embed only the first so many tokens of every prompt; None embeds all

        Every argument is checked before this returns. Raises InputError, TokenError, LengthError (a prompt that no row
        can hold), ModeError, FactorsError, QueueFullError, or ClosedError after `close`.
        """
        runtime = self.runtime
        ids = runtime._encode(prompts)
        adaptation = runtime.adapt(
            ids, mode=mode, tenants=None if tenant is None else [tenant] * len(ids), factors=factors
        )
        with self._lock:
            if not self._open:
                raise ClosedError("the engine is closed")
            if self._present + len(ids) * n > self.rows + self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests wait already: try again later")
            self._present += len(ids) * n
        stream = Stream(ids, adaptation.cluster_ids.tolist(), mode or runtime.mode, n)
        repeated = [row for row in ids for _ in range(n)]

        def generate() -> list[Generation]:
            return runtime.generate(
                repeated, max_new_tokens=max_new_tokens, sampling=sampling, mode=mode, factors=factors,
                tenants=None if tenant is None else [tenant] * len(repeated),
            )  # fmt: skip

        self._commands.put((stream, generate))
        return stream

    def stats(self) -> Stats:
        """Safe to call from any thread."""
        return Stats(0, self._present, self.rows, 0, 0, 0)

    def close(self, drain_seconds: float = 30) -> None:
        """Take nothing new, finish what was accepted, and end the thread.

        What has not ended after drain_seconds is cancelled.
        """
        with self._lock:
            self._open = False
        self._commands.put(None)
        self._thread.join(drain_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            stream, generate = command
            time.sleep(0)
            try:
                generations = generate()
            except ChameleonError as error:
                generations = [Generation([], "", -1, "error", error)] * (len(stream.prompts) * stream.n)
            tokens = [Token(row, g.token_ids[-1], g.text, g) for row, g in enumerate(generations)]
            deliver({stream: tokens})
            with self._lock:
                self._present -= len(tokens)
