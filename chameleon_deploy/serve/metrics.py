"""Prometheus metrics: what the engine reports of every iteration, and what the server refuses.

Names are vLLM's where the meaning is the same. A row is one continuation of one prompt.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sized

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime.engine.engine import Engine, Stats
from chameleon_deploy.runtime.engine.iteration import FinishedRow, Iteration

CONTENT_TYPE = CONTENT_TYPE_LATEST

_STEP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_WAIT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)
LABELLED = 20  # adapters
OTHERS = "(others)"  # which no adapter can be named
PERIOD = 4096  # rows after which older rows count half


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of rows that ended.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._counter("request_success", "Rows that ended by themselves.", "finished_reason")
        self._failed = self._counter("requests_failed", "Rows that an error ended.")
        self._cancelled = self._counter("requests_cancelled", "Rows that were cancelled.")
        self._requests = self._counter("requests", "Prompts accepted.", "mode", "cluster")
        self._rejected = self._counter("requests_rejected", "Requests refused, by error code.", "reason")
        self._hits = self._counter("factor_set_hits", "Rows admitted whose factor set was resident.")
        self._first_token = self._histogram("time_to_first_token_seconds", "From submit to first token.", _WAIT)
        self._later_token = self._histogram("inter_token_latency_seconds", "From a token to the next.", _STEP)
        self._whole = self._histogram("e2e_request_latency_seconds", "From submit to end.", _WHOLE)
        self._queued = self._histogram("request_queue_time_seconds", "From submit to admission.", _WAIT)
        self._batch_rows = self._histogram("batch_rows", "Rows in a step.", _ROWS)
        self._batch_sets = self._histogram("batch_factor_sets", "Factor sets in a step.", _ROWS)
        self._step = self._histogram("step_seconds", "Time of the decoder's step.", _STEP)
        self._slow_steps = self._counter("slow_steps", "Iterations of the engine that took longer than allowed.")
        self._chunk = self._histogram("prefill_seconds", "Time of a chunk of a prompt.", _STEP)
        adapter_rows = self._counter("adapter_requests", "Rows that ended, by adapter.", "adapter")
        adapter_prompts = self._counter("adapter_prompt_tokens", "Prompt tokens of these rows.", "adapter")
        adapter_tokens = self._counter("adapter_generation_tokens", "Tokens generated in these rows.", "adapter")
        self._adapter_counters = adapter_rows, adapter_prompts, adapter_tokens
        self._adapter_first_token = self._histogram(
            "adapter_time_to_first_token_seconds", "From submit to first token, of these rows.", _WAIT, "adapter"
        )
        self._adapter_queued = self._histogram(
            "adapter_request_queue_time_seconds", "From submit to admission, of these rows.", _WAIT, "adapter"
        )
        self._busiest = Busiest(self._forget_adapter)

    def count_connections(self, connections: Sized) -> None:
        """Read how many connections are open whenever it is asked for."""
        gauge = Gauge("chameleon_connections", "Connections that are open.", registry=self._registry)
        gauge.set_function(lambda: len(connections))

    def count_adapters(self, names: Callable[[], Sized]) -> None:
        """Read how many adapters there are whenever it is asked for."""
        gauge = Gauge("chameleon_adapters_loaded", "Adapters of the bundle and from files.", registry=self._registry)
        gauge.set_function(lambda: len(names()))

    def watch(self, engine: Engine) -> None:
        """Read the gauges from an engine whenever they are asked for."""
        self._gauge("num_requests_running", "Rows in the batch.", engine, lambda stats: stats.running)
        self._gauge("num_requests_waiting", "Rows that wait for a place.", engine, lambda stats: stats.waiting)
        self._gauge("kv_cache_usage_perc", "Part of the key-value cache in use, 0 to 1.", engine, _cache_usage)
        self._gauge("factor_sets_resident", "Factor sets in the table.", engine, lambda stats: stats.factor_sets)

        self._registry.register(PrefixCacheCollector(engine))

    def observe(self, iteration: Iteration) -> None:
        """Called by the engine after every iteration."""
        if iteration.rows:
            self._step.observe(iteration.step)
            self._batch_rows.observe(iteration.rows)
            self._batch_sets.observe(iteration.factor_sets)
        if iteration.prefilled_tokens:
            self._chunk.observe(iteration.chunk)
        self._hits.inc(iteration.factor_set_hits)
        self._generation_tokens.inc(len(iteration.first_tokens) + len(iteration.later_tokens))
        for histogram, seconds in (
            (self._queued, iteration.queued), (self._first_token, iteration.first_tokens),
            (self._later_token, iteration.later_tokens),
        ):  # fmt: skip
            for value in seconds:
                histogram.observe(value)
        for row in iteration.finished:
            self._finish(row)

    def accept(self, mode: Mode, cluster_id: int) -> None:
        self._requests.labels(mode, str(cluster_id)).inc()

    def slow_step(self) -> None:
        self._slow_steps.inc()

    def reject(self, code: str) -> None:
        self._rejected.labels(code).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _finish(self, row: FinishedRow) -> None:
        self._prompt_tokens.inc(row.prompt_tokens)
        self._whole.observe(row.seconds)
        for adapter in row.adapters:
            self._finish_adapted(self._busiest.label(adapter), row)
        if row.finish_reason == "cancelled":
            self._cancelled.inc()
        elif row.finish_reason == "error":
            self._failed.inc()
        else:
            self._success.labels(row.finish_reason).inc()

    def _finish_adapted(self, label: str, row: FinishedRow) -> None:
        for counter, count in zip(self._adapter_counters, (1, row.prompt_tokens, row.new_tokens), strict=True):
            counter.labels(label).inc(count)
        for histogram, seconds in (
            (self._adapter_first_token, row.first_token), (self._adapter_queued, row.queued),
        ):  # fmt: skip
            if seconds is not None:
                histogram.labels(label).observe(seconds)

    def _forget_adapter(self, label: str) -> None:
        for metric in (*self._adapter_counters, self._adapter_first_token, self._adapter_queued):
            metric.remove(label)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"chameleon_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"chameleon_{name}", text, labels, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str, engine: Engine, value: Callable[[Stats], float]) -> None:
        gauge = Gauge(f"chameleon_{name}", text, registry=self._registry)
        gauge.set_function(lambda: value(engine.stats()))


class PrefixCacheCollector(Collector):
    """What an engine's prefix cache has counted, read whenever it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.prefix_cache_stats()
        for name, text, value in (
            ("queries", "Prompt tokens that were looked for in the prefix cache.", stats.queries),
            ("hits", "Prompt tokens that were found in the prefix cache.", stats.hits),
            ("evictions", "Tokens that left the prefix cache to make room for others.", stats.evictions),
        ):
            yield CounterMetricFamily(f"chameleon_prefix_cache_{name}", text, value)
        for name, text, value in (
            ("tokens", "Tokens in the prefix cache.", stats.tokens),
            ("bytes", "Bytes of keys and values in the prefix cache.", stats.bytes),
        ):
            yield GaugeMetricFamily(f"chameleon_prefix_cache_{name}", text, value)


def _cache_usage(stats: Stats) -> float:
    return stats.cached_tokens / stats.cache_capacity


class Busiest:
    """Gives labels to adapters' names as they are used: to the busiest, so that the number of labels is bounded.

    What is counted under a label never moves to another.

    A name without a label takes that of the least used name once it is used twice as often, so that two names of the
    same use do not take turns. Names that are used no more are forgotten.
    """

    def __init__(self, forget: Callable[[str], None], labelled: int = LABELLED) -> None:
        """forget: called with a label that is used no more"""
        self._forget, self._most = forget, labelled
        self._labels: set[str] = set()
        self._uses = Counts[str]()
        self._left = PERIOD

    def label(self, name: str) -> str:
        """Count a use of a name, and return its label."""
        self._count(name)
        if name not in self._labels:
            if len(self._labels) >= self._most:
                least = min(self._labels, key=lambda label: self._uses[label])
                if self._uses[name] <= 2 * self._uses[least]:
                    return OTHERS
                self._labels.remove(least)
                self._forget(least)
            self._labels.add(name)
        return name

    def _count(self, name: str) -> None:
        self._uses[name] += 1
        self._left -= 1
        if not self._left:
            self._left = PERIOD
            self._uses = Counts({each: uses // 2 for each, uses in self._uses.items() if uses > 1})
