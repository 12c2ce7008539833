"""Continuous batching: one thread drives the decoder, any number of threads and coroutines submit to it."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypedDict, Unpack

from chameleon_deploy.errors import ClosedError, InputError, QueueFullError, RequestError
from chameleon_deploy.runtime.adaptation import Adapt
from chameleon_deploy.runtime.chat.conversation import Messages
from chameleon_deploy.runtime.chat.template import chat_generate, chat_prompt
from chameleon_deploy.runtime.decode.prefix_cache import PrefixCache, PrefixCacheStats
from chameleon_deploy.runtime.decode.schedule import MIN_PREFILL_TOKENS, Schedule, most_rows
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.engine.batch import ContinuousBatch
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.iteration import Iteration
from chameleon_deploy.runtime.engine.loop import Loop, open_batch
from chameleon_deploy.runtime.engine.stream import Stream, deliver
from chameleon_deploy.runtime.engine.submission import Submission, form_cohort, prepare, prepare_scores
from chameleon_deploy.runtime.engine.tenants import NOBODY, Accounts, Tenant
from chameleon_deploy.runtime.generation import Generate, GenerateKeywords, Token
from chameleon_deploy.runtime.inputs import MAX_ROWS, Texts, check_integer, check_names, check_number, chosen
from chameleon_deploy.runtime.machine import free_memory

if TYPE_CHECKING:  # the runtime drives the loop of this folder
    from chameleon_deploy.runtime.runtime import Runtime

CACHE_SHARE = 0.5  # of the free memory that keys and values take by default at most
PREFIX_SHARE = 0.1  # of the free memory, for the prefix cache
MIN_CAPACITY = 16  # tokens of a row: with less free memory an engine does not start
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stats:
    """The state of an engine at one moment.

    running, waiting  rows in the batch, and rows that wait for a place
    rows              places in the batch
    cached_tokens     tokens in the key-value cache, of cache_capacity
    factor_sets       resident factor sets
    """

    running: int
    waiting: int
    rows: int
    cached_tokens: int
    cache_capacity: int
    factor_sets: int


@dataclass(frozen=True)
class EngineOptions:
    """The limits of an engine.

    rows              places in the batch
    max_waiting       rows that may wait for a place; a submit of more rows than are free, or of several that are more
                      than half of those, raises QueueFullError
    prefill_tokens    prompt tokens that are prefilled between two steps of the running rows, at least 8
    max_factor_sets   different factor sets in the batch at a time; None means as many as rows
    cohort_window_ms  how long a submit in mode cohort, or in mode tenant of the same tenants, waits for others that
                      join its cohort; with 0 a cohort is the prompts of one submit
    capacity          tokens per row that the key-value cache holds; None means the model's positions, or as many as fit
                      into half of the free memory (`machine.free_memory`)
    prefix_cache_bytes  of keys and values that later prompts may begin with; None means a tenth of the free memory, 0
                      keeps none. Decoders without slots keep none

    Raises InputError.
    """

    rows: int = 8
    max_waiting: int = 256
    prefill_tokens: int = 256
    max_factor_sets: int | None = None
    cohort_window_ms: float = 0
    capacity: int | None = None
    prefix_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        check_number("cohort_window_ms", self.cohort_window_ms, 0)
        limits = {"rows": (1, MAX_ROWS), "max_waiting": (0,), "prefill_tokens": (MIN_PREFILL_TOKENS,)}
        optional = {"max_factor_sets": (1,), "capacity": (1,), "prefix_cache_bytes": (0,)}
        limits |= {name: limit for name, limit in optional.items() if getattr(self, name) is not None}
        for name, limit in limits.items():
            object.__setattr__(self, name, check_integer(name, getattr(self, name), *limit))


class EngineKeywords(TypedDict, total=False):
    """The fields of EngineOptions as keywords."""

    rows: int
    max_waiting: int
    prefill_tokens: int
    max_factor_sets: int | None
    cohort_window_ms: float
    capacity: int | None
    prefix_cache_bytes: int | None


class Engine:
    """Generate for many callers at once on one runtime. See `submit`.

    runtime   the runtime that it drives; other threads may use it too and share the processor
    capacity  tokens that a row holds
    batching  "continuous": rows join and leave a running batch; "static", for decoders without slots: a batch of
              waiting rows runs to its end
    """

    runtime: Runtime
    capacity: int
    batching: Literal["continuous", "static"]

    def __init__(
        self,
        runtime: Runtime,
        options: EngineOptions | None = None,
        *,
        observe: Callable[[Iteration], None] | None = None,
        **keywords: Unpack[EngineKeywords],
    ) -> None:
        """Start the engine's thread.

        options, keywords  see EngineOptions
        observe            called by the engine's thread after every iteration; must be quick. Its exceptions are logged

        Raises InputError, also for rows and a capacity that do not fit into the free memory.
        """
        check_names(keywords, EngineOptions)
        options = chosen(EngineOptions, options, keywords)
        self.runtime, self.rows, self.max_waiting = runtime, options.rows, options.max_waiting
        self.capacity = _capacity(runtime, options)
        self._window, self._observe = options.cohort_window_ms / 1000, observe
        table = FactorTable(options.max_factor_sets or options.rows)
        self._prefixes = _prefix_cache(runtime, options)
        schedule = Schedule(options.prefill_tokens)
        self._batch = open_batch(runtime.backend, table, options.rows, self.capacity, schedule, self._prefixes)
        self.batching = "continuous" if isinstance(self._batch, ContinuousBatch) else "static"
        self._loop = Loop(self._batch, table, runtime.tokenizer, runtime.manifest.model.eos_token_id)
        self._commands: SimpleQueue[Submission | None] = SimpleQueue()  # None wakes the thread
        # the closing time and the members of each
        self._open_cohorts: dict[Hashable, tuple[float, list[Submission]]] = {}
        self._cohort_ids = itertools.count()
        self._present = 0  # submitted rows that have not ended
        self._accounts = Accounts(options.rows, options.max_waiting)
        self._closing = self._cancelling = False
        self._iteration_began: float | None = None
        self._lock = threading.Lock()  # guards _present and _closing
        self._thread = threading.Thread(target=self._run, name="chameleon-engine", daemon=True)
        self._thread.start()
        # A daemon thread inside a native call would crash the interpreter at exit.
        atexit.register(self.close, 0)

    def submit(
        self,
        prompts: Texts,
        generate: Generate | None = None,
        adapt: Adapt | None = None,
        tenant: Tenant = NOBODY,
        **keywords: Unpack[GenerateKeywords],
    ) -> Stream:
        """Queue every prompt. Returns at once; safe to call from any thread.

        Arguments as in `Runtime.stream`; a row is also bounded by the engine's capacity.

        tenant  whose share of the engine the rows take; not those of mode tenant

        Every argument is checked before this returns. Raises InputError, TokenError, LengthError (a prompt that no row
        can hold), ModeError, FactorsError, AdapterError, QueueFullError, RateLimitError, or ClosedError after `close`.
        """
        check_names(keywords, Generate, Adapt)
        generate, adapt = chosen(Generate, generate, keywords), chosen(Adapt, adapt, keywords)
        submission = prepare(self.runtime, prompts, generate, adapt, self.capacity, tenant)
        return self._queue(submission, tenant, generate.n)

    def submit_scores(
        self,
        prompts: Texts,
        continuations: Texts,
        generate: Generate | None = None,
        adapt: Adapt | None = None,
        tenant: Tenant = NOBODY,
        **keywords: Unpack[GenerateKeywords],
    ) -> Stream:
        """Queue the scoring of continuations, given their prompts. Returns at once; safe to call from any thread.

        The rows of the stream take the tokens of the continuations: `Generation.token_logprobs` are their
        log-probabilities. Prompts are read as `submit` reads them, so what they share with others is read once.

        prompts        one for each continuation, or one for all
        continuations  texts, where prompts are texts, or lists of token ids
        generate       its deadline, cache_salt and cache_generated
        tenant         see `submit`

        Raises what `submit` raises, and InputError for a continuation without tokens.
        """
        check_names(keywords, Generate, Adapt)
        generate, adapt = chosen(Generate, generate, keywords), chosen(Adapt, adapt, keywords)
        submission = prepare_scores(self.runtime, prompts, continuations, generate, adapt, self.capacity, tenant)
        return self._queue(submission, tenant)

    def _queue(self, submission: Submission, tenant: Tenant, n: int = 1) -> Stream:
        rows, places = len(submission.members), self.rows + self.max_waiting
        if rows > (most := most_rows(places)):
            name = "n" if n > 1 else "prompts"
            raise InputError(f"{rows} rows in one submit: this engine takes at most {most}", name)
        if not self._window or submission.cohort_key is None:
            form_cohort(self.runtime, [submission], next(self._cohort_ids))
        with self._lock:
            if self._closing:
                raise ClosedError("the engine is closed and takes no new requests")
            if rows > most_rows(places - self._present):
                raise QueueFullError(f"no room for {rows} rows, at most {self.max_waiting} may wait: try again later")
            self._accounts.begin(tenant, rows, sum(map(len, submission.stream.prompts)))
            self._present += rows
            self._commands.put(submission)
        return submission.stream

    def submit_chat(
        self,
        messages: Messages,
        generate: Generate | None = None,
        adapt: Adapt | None = None,
        tenant: Tenant = NOBODY,
        **keywords: Unpack[GenerateKeywords],
    ) -> Stream:
        """Queue a conversation. Arguments and errors as in `Runtime.chat` and `submit`; n may be more than 1."""
        check_names(keywords, Generate, Adapt)
        ids, generate = chat_prompt(self.runtime.chat_template, messages, chat_generate(generate, keywords))
        return self.submit([ids], generate, chosen(Adapt, adapt, keywords), tenant)

    @property
    def closed(self) -> bool:
        """Return whether no request is accepted: after `close`, or a fault of the thread."""
        return self._closing

    @property
    def iteration_began(self) -> float | None:
        """Return the time of the monotonic clock when the current iteration began; None between two."""
        return self._iteration_began

    def stats(self) -> Stats:
        """Return the current state. Safe to call from any thread."""
        running, capacity = len(self._batch.members), self.rows * self.capacity
        waiting = max(0, self._present - running)
        return Stats(running, waiting, self.rows, self._batch.cached_tokens, capacity, len(self._loop.table))

    def prefix_cache_stats(self, salt: str = "") -> PrefixCacheStats:
        """Return the state of the prefix cache, with the tokens and bytes of salts that begin with `salt`.

        Safe to call from any thread, like `clear_prefix_cache`.
        """
        return PrefixCacheStats() if self._prefixes is None else self._prefixes.stats(salt)

    def clear_prefix_cache(self, salt: str = "") -> None:
        """Forget the keys and values of requests whose `cache_salt` begins with `salt`; their rows are not affected."""
        if self._prefixes is not None:
            self._prefixes.clear(salt)

    def close(self, drain_seconds: float = 30) -> None:
        """Accept no new request, finish the accepted ones, and end the thread. A second call does nothing.

        drain_seconds  after which rows that have not ended are cancelled
        """
        with self._lock:
            self._closing = True
            self._commands.put(None)
        self._thread.join(drain_seconds)
        self._cancelling = True
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self._cancelling:
                    self._loop.cancel()
                self._iteration_began = time.monotonic()
                self._hand_out(*self._loop.iterate())
                self._iteration_began = None
        except BaseException as error:  # a fault of this package must not leave a caller waiting
            self._fail(error)

    def _take_commands(self) -> bool:
        """Take everything that was submitted; wait for it if nothing else is to be done. False at the end."""
        timeout = self._idle_seconds()
        with contextlib.suppress(Empty):
            self._take(self._commands.get(timeout != 0, timeout))
            while True:
                self._take(self._commands.get_nowait())
        self._close_cohorts()
        with self._lock:
            return bool(self._present or self._loop or not self._closing)

    def _idle_seconds(self) -> float | None:
        """Return how long the thread may sleep unless something is submitted; None for no limit."""
        if self._loop or self._closing:
            return 0
        closings = [closing for closing, _ in self._open_cohorts.values()]
        return max(0.0, min(closings) - time.monotonic()) if closings else None

    def _take(self, submission: Submission | None) -> None:
        if submission is None:
            return
        if not self._window or submission.cohort_key is None:
            self._loop.waiting.extend(submission.members)
            return
        closing = time.monotonic() + self._window
        try:
            self._open_cohorts.setdefault(submission.cohort_key, (closing, []))[1].append(submission)
        except Exception as error:  # of a tenant's own comparison
            self._loop.refuse(submission.members, error)

    def _close_cohorts(self) -> None:
        now = time.monotonic()
        for key, (closing, submissions) in list(self._open_cohorts.items()):
            if now < closing and not self._closing:  # nothing joins a cohort of a closing engine
                continue
            del self._open_cohorts[key]
            members = [member for submission in submissions for member in submission.members]
            try:
                form_cohort(self.runtime, submissions, next(self._cohort_ids))
            except Exception as error:  # as above
                self._loop.refuse(members, error)
            else:
                self._loop.waiting.extend(members)

    def _hand_out(self, tokens: dict[Stream, list[Token]], iteration: Iteration) -> None:
        with self._lock:
            self._present -= len(iteration.finished)
            for row in iteration.finished:
                self._accounts.end(row)
        deliver(tokens)
        if self._observe is not None:
            try:
                self._observe(iteration)
            except Exception:  # an observer's fault must not end a request
                _log.exception("the engine's observer raised")

    def _fail(self, error: BaseException) -> None:
        """End everything that was accepted, and accept nothing more."""
        with self._lock:
            self._closing = True
        with contextlib.suppress(Empty):
            while True:
                self._take(self._commands.get_nowait())
        for _, submissions in self._open_cohorts.values():
            self._loop.waiting.extend(member for submission in submissions for member in submission.members)
        failure = RequestError(f"the engine failed: {error!r}")
        failure.__cause__ = error
        self._hand_out(*self._loop.fail(failure))


def _prefix_cache(runtime: Runtime, options: EngineOptions) -> PrefixCache | None:
    """Return an empty prefix cache, or None if there is to be none.

    Raises InputError.
    """
    max_bytes, decoder = options.prefix_cache_bytes, runtime.decoder
    if not isinstance(decoder, SharedCacheDecoder):
        if max_bytes:
            message = f"the decoder of provider {runtime.provider!r} has no prefix cache: leave prefix_cache_bytes out"
            raise InputError(message, "prefix_cache_bytes")
        return None
    if max_bytes is None:
        max_bytes = int(PREFIX_SHARE * (free_memory() or 0))
    return decoder.prefix_cache(runtime.bundle.digest, max_bytes) if max_bytes else None


def _capacity(runtime: Runtime, options: EngineOptions) -> int:
    """Return the tokens of a row: those given, the model's positions, or what half of the free memory holds.

    The decoder of a device manages its own memory.

    Raises InputError, which names what does not fit.
    """
    positions, decoder = runtime.manifest.model.max_positions, runtime.decoder
    wanted = min(options.capacity or positions, positions)
    free = free_memory()
    if free is None or not isinstance(decoder, SharedCacheDecoder):
        return wanted
    row_bytes = options.rows * decoder.token_bytes  # of one token in every row
    least = wanted
    if options.capacity is None:
        wanted, least = min(wanted, int(CACHE_SHARE * free) // row_bytes), min(MIN_CAPACITY, positions)
    if wanted < least or wanted * row_bytes > free:
        raise InputError(
            f"keys and values of {options.rows} rows of {least:,} tokens take {least * row_bytes / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free: pass fewer rows or a smaller capacity",
            "rows" if options.capacity is None else "capacity",
        )
    return wanted
