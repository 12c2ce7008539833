"""The served model, and the states of the server around it: loading, ready, draining."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import chameleon_deploy
from chameleon_deploy.contract.bundle import FloatArray, Mode
from chameleon_deploy.contract.manifest import CHAT_TEMPLATE
from chameleon_deploy.errors import BundleChangedError
from chameleon_deploy.runtime import Adapt, Engine, Runtime
from chameleon_deploy.serve.adapters import AdapterDirectories
from chameleon_deploy.serve.bodies import UnfinishedBodies
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.keys import Keys
from chameleon_deploy.serve.logprobs import TokenNames
from chameleon_deploy.serve.metrics import Metrics
from chameleon_deploy.serve.models import Meant, Models
from chameleon_deploy.serve.settings import Settings
from chameleon_deploy.verify.gates import require_passed
from chameleon_deploy.verify.here import known_answer_checks

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A loaded bundle and all that is made of it once.

    adapter_directories  of the adapters that requests may load; None where they may not
    sanitize_control_tokens  see Conversation
    cluster_sizes  prompts completed per cluster
    scorer         the one thread that scores: many at once would only slow the engine down
    compiler       the one thread that compiles structured outputs
    """

    runtime: Runtime
    engine: Engine
    models: Models
    names: TokenNames
    metrics: Metrics
    centroids: FloatArray
    cohort_window_ms: float
    adapter_directories: AdapterDirectories | None
    sanitize_control_tokens: bool
    cluster_sizes: Counter[int] = field(default_factory=Counter)
    scorer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "chameleon-scorer"))
    compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "chameleon-compiler"))

    def count_prompt(self, mode: Mode, cluster_id: int) -> None:
        """Count a prompt that was accepted."""
        self.metrics.accept(mode, cluster_id)
        self.cluster_sizes[cluster_id] += 1

    def fingerprint(self, meant: Meant) -> str:
        """Return what computes a request: bundle, provider, precision, and the file of its adapter.

        For several adapters, or with weights, the last is a digest of them all; the bundle's own are in its digest.
        """
        runtime = self.runtime
        parts = [runtime.bundle.digest[:16], runtime.provider, runtime.manifest.precision]
        blends = [[(adapter, weight) for adapter, _, weight in blend.parts] for blend in meant.blends or ()]
        match blends:
            case []:
                pass
            case [[(adapter, 1.0)]]:
                parts += [adapter.digest[:16]] if adapter.digest else []
            case _:
                used = [[(each.digest or each.name, weight) for each, weight in row] for row in blends]
                parts.append(hashlib.sha256(repr(used).encode()).hexdigest()[:16])
        return "-".join(parts)

    @property
    def max_prompts(self) -> int:
        """Of one request, whatever it asks for."""
        return self.engine.rows + self.engine.max_waiting

    async def score(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the scorer's thread. Raises ApiError where it has ended."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.scorer, function, *arguments)
        except RuntimeError as error:
            if not self.engine.closed:
                raise
            raise ApiError(503, "closed", "the server ended before it had answered") from error


class Watchdog:
    """A thread that notices an iteration of the engine that takes too long, within a quarter of that."""

    def __init__(self, engine: Engine, seconds: float, count: Callable[[], None]) -> None:
        self._engine, self._seconds, self._count = engine, seconds, count
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="chameleon-watchdog", daemon=True).start()

    def slow_seconds(self) -> float:
        """Return how long the current iteration has taken if that is too long, else 0."""
        began = self._engine.iteration_began
        seconds = 0.0 if began is None else time.monotonic() - began
        return seconds if seconds > self._seconds else 0.0

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        told: float | None = None  # the beginning of the last slow iteration
        while not self._stopped.wait(self._seconds / 4):
            began = self._engine.iteration_began
            if began != told and (seconds := self.slow_seconds()):
                told = began
                self._count()
                _log.error("a step of the engine has taken %.1f seconds and has not ended", seconds)


class Service:
    """One server. Requests are counted while they are worked on."""

    def __init__(self, settings: Settings, has_peers: bool = False) -> None:
        """has_peers: whether other servers answer the same requests

        Raises InputError for a file of API keys that cannot be used.
        """
        self._has_peers = has_peers
        self.settings, self.keys, self.metrics = settings, Keys(settings.api_keys), Metrics()
        self._served: ServedModel | None = None
        self._draining = self._aborted = self._ended = self._told_of_change = False
        self._requests = Counter[str | None]()  # that are worked on, by tenant
        self.unfinished_bodies = UnfinishedBodies(max(settings.max_unfinished_bytes, settings.max_body_bytes))
        self._watchdog: Watchdog | None = None

    def open(self) -> None:
        """Load the bundle and start the engine. Raises a ChameleonError, see `chameleon_deploy.load`, or
        CheckFailedError where the self-check misses.
        """
        s = self.settings
        runtime = chameleon_deploy.load(
            s.bundle, s.provider, threads=s.threads, share_weights=s.share_weights, trusted_keys=s.trusted_keys
        )
        if s.self_check:
            require_passed(known_answer_checks(runtime))
        name = runtime.bundle.path.resolve().name
        models = Models(name, runtime.manifest, s.mode, bool(self.keys), runtime.adapters)
        runtime.adapters.max_bytes = s.max_adapter_bytes
        size = runtime.manifest.adaptation.conditioning_size
        tenants = [""] if models.default == "tenant" else None
        vectors = [[0.0] * size] if size and models.default == "request" else None
        runtime.adapt([[0]], Adapt(models.default, tenants, conditioning=vectors))  # makes factors
        names = TokenNames(runtime.tokenizer, runtime.manifest.model.vocab_size)
        # With keys there is one more row, which is kept for a tenant that has none.
        engine = Engine(
            runtime, rows=s.rows + bool(self.keys), max_waiting=s.max_waiting, prefill_tokens=s.prefill_tokens,
            max_factor_sets=s.max_factor_sets, capacity=s.capacity, prefix_cache_bytes=s.prefix_cache_bytes,
            cohort_window_ms=s.cohort_window_ms, observe=self.metrics.observe,
        )  # fmt: skip
        models.max_length = engine.capacity
        self.metrics.watch(engine)
        self.metrics.count_adapters(lambda: runtime.adapters.names)
        centroids = runtime.bundle.centroids()
        if CHAT_TEMPLATE in runtime.manifest.files:  # what the first conversation would wait for
            _ = runtime.chat_template.stop_token_ids, runtime.chat_template.takes_tools
        directories = None
        if s.adapters:
            directories = AdapterDirectories(s.adapters, runtime, s.adapter_resolver, self._has_peers)
        self._watchdog = Watchdog(engine, s.max_step_seconds, self.metrics.slow_step)
        self._served = ServedModel(
            runtime, engine, models, names, self.metrics, centroids, s.cohort_window_ms, directories,
            s.sanitize_control_tokens,
        )  # fmt: skip
        products = f", {runtime.integer_weights} weights in integer products" if runtime.integer_weights else ""
        _log.info("serving %s: %s on %s%s", name, runtime.manifest.precision, runtime.provider, products)

    @property
    def served(self) -> ServedModel:
        """Raises ApiError unless requests can be taken."""
        if self._draining:
            raise ApiError(503, "draining", "the server finishes what it has and takes nothing new")
        if self._served is None:
            raise ApiError(503, "loading", "the server is loading its bundle")
        if self._served.engine.closed:
            raise ApiError(503, "closed", "the engine has stopped: restart the server")
        return self._served

    @property
    def ended(self) -> bool:
        """Return whether the time to drain is over."""
        return self._ended

    def check_health(self) -> None:
        """Raises ApiError unless requests can be taken and the engine goes on."""
        self.check_bundle()
        if self._watchdog is not None and (seconds := self._watchdog.slow_seconds()):
            raise ApiError(503, "step_slow", f"the engine's step has taken {seconds:.0f} seconds: see the log")

    def check_bundle(self) -> None:
        """Raises ApiError unless requests can be taken: also where the bundle's files have changed."""
        try:
            self.served.runtime.check_unchanged()
        except BundleChangedError as error:
            if not self._told_of_change:
                _log.error("%s", error)
            self._told_of_change = True
            raise ApiError(503, error.code, "the bundle's files have changed: restart the server") from error

    def begin(self, tenant: str | None = None) -> None:
        """Count a request; `end` must follow. A tenant has at most half of what others leave. Raises ApiError."""
        count, own = self._requests.total(), self._requests[tenant]
        left = self.settings.max_requests - (count - own)
        if count >= self.settings.max_requests or (tenant is not None and own >= max(left // 2, 1)):
            raise ApiError(429, "too_many_requests", f"{count} requests are being worked on: try again later")
        self._requests[tenant] += 1

    def end(self, tenant: str | None = None) -> None:
        self._requests[tenant] -= 1

    def drain(self) -> None:
        """Finish what was accepted, for at most drain_seconds, and close the engine. Blocks.

        A second call does nothing.
        """
        if self._draining:
            return
        self._draining = True
        if self._served is None:
            return
        end = time.monotonic() + self.settings.drain_seconds
        self._served.engine.close(self.settings.drain_seconds)
        while self._requests.total() and time.monotonic() < end and not self._aborted:  # those that score
            time.sleep(0.02)
        self._ended = True
        for executor in (self._served.scorer, self._served.compiler):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._watchdog is not None:
            self._watchdog.stop()

    def abort(self) -> None:
        """End a drain at once. Blocks until the engine has ended."""
        self._aborted = self._ended = True
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._served is not None:
            self._served.engine.close(0)
