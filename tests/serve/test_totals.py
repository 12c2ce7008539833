"""Metrics of several replicas: sums that no ending replica makes smaller."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from chameleon_deploy.runtime.decode.prefix_cache import PrefixCacheStats
from chameleon_deploy.runtime.engine.engine import Stats
from chameleon_deploy.runtime.engine.iteration import FinishedRow, Iteration
from chameleon_deploy.serve.metrics import Metrics
from chameleon_deploy.serve.totals import Totals


class _Engine:
    """What the gauges read."""

    def __init__(self, running: int) -> None:
        self._running = running

    def stats(self) -> Stats:
        return Stats(self._running, 0, 8, self._running, 10, 1)

    def prefix_cache_stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(queries=100 * self._running, hits=10 * self._running)


def _text(running: int, tokens: int) -> bytes:
    metrics = Metrics()
    metrics.watch(_Engine(running))  # type: ignore[arg-type]
    metrics.accept("centroid", 3)
    metrics.observe(_iteration(tokens))
    return metrics.text()


def _iteration(tokens: int) -> Iteration:
    row = FinishedRow("centroid", 3, "length", 5, tokens, 0.5)
    return Iteration(rows=1, factor_sets=1, step=0.02, later_tokens=[0.02] * tokens, finished=[row])


def _values(text: bytes) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[sample.name + "".join(f",{key}={value}" for key, value in sample.labels.items())] = sample.value
    return found


def test_sums_and_means() -> None:
    values = _values(Totals().add_up({"a": _text(2, 10), "b": _text(6, 5)}))
    assert values["chameleon_generation_tokens_total"] == 15
    assert values["chameleon_requests_total,cluster=3,mode=centroid"] == 2
    assert values["chameleon_num_requests_running"] == 8
    assert values["chameleon_prefix_cache_queries_total"] == 800
    assert values["chameleon_prefix_cache_hits_total"] == 80
    assert values["chameleon_kv_cache_usage_perc"] == (0.2 + 0.6) / 2
    assert values["chameleon_step_seconds_bucket,le=0.02"] == values["chameleon_step_seconds_count"] == 2
    assert not any("_created" in name for name in values)


def test_a_label_that_a_replica_forgot_stays_counted() -> None:
    metrics, other, totals = Metrics(), Metrics(), Totals()
    row = FinishedRow("static", 0, "length", 5, 7, 0.5, 0.1, 0.2, ("legal",))
    for each in (metrics, other):
        each.observe(Iteration(finished=[row]))
    for _ in range(2):
        values = _values(totals.add_up({"a": metrics.text(), "b": other.text()}))
        assert values["chameleon_adapter_generation_tokens_total,adapter=legal"] == 14
        assert values["chameleon_adapter_time_to_first_token_seconds_count,adapter=legal"] == 2
        if b"legal" in metrics.text():
            metrics._forget_adapter("legal")


def test_the_labels_of_adapters_are_bounded() -> None:
    """Names come and go, with replicas and in each of them: what none tells of any more is not kept for ever."""
    totals = Totals()
    for number in range(10):
        metrics = Metrics()
        names = (f"a{number}", f"b{number}", "legal")
        metrics.observe(Iteration(finished=[FinishedRow("static", 0, "length", 5, 7, 0.5, 0.1, 0.2, names)]))
        totals.add_up({str(number): metrics.text()})
        metrics._forget_adapter(f"b{number}")
        values = _values(totals.add_up({str(number): metrics.text()}))
        labels = {name.partition(",adapter=")[2].partition(",")[0] for name in values if ",adapter=" in name}
        assert labels == {f"a{number}", "legal"}
        assert values["chameleon_adapter_generation_tokens_total,adapter=legal"] == 7 * (number + 1)
    values = _values(totals.add_up({}))
    assert values["chameleon_prompt_tokens_total"] == 50
    assert not any(",adapter=" in name for name in values)


def test_a_replica_that_ended_stays_counted() -> None:
    totals = Totals()
    totals.add_up({"a": _text(2, 10), "b": _text(6, 5)})
    for _ in range(2):
        values = _values(totals.add_up({"b": _text(6, 7)}))
        assert values["chameleon_generation_tokens_total"] == 17
        assert values["chameleon_num_requests_running"] == 6
    values = _values(totals.add_up({"c": _text(1, 1)}))
    assert values["chameleon_generation_tokens_total"] == 18
    assert values["chameleon_inter_token_latency_seconds_count"] == 18
