"""The metrics of all replicas, added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

MEANS = ("chameleon_kv_cache_usage_perc",)  # gauges whose sum means nothing

Families = dict[str, Metric]


@dataclass
class Totals:
    """Sums over replicas. What a replica counted before it ended, or under a label that it has no more, stays counted,
    so that no counter goes back. An adapter's series end where no replica has a label for it any more: each has few.

    last  families of each replica that lived at the last call, by its name
    past  counters and histograms of those that have ended
    """

    last: dict[str, Families] = field(default_factory=dict)
    past: list[Families] = field(default_factory=list)

    def add_up(self, texts: Mapping[str, bytes]) -> bytes:
        """Return one text in Prometheus' format of the texts of all living replicas, by their names."""
        now = {name: _parse(text) for name, text in texts.items()}
        counted = [_gone(families, now.get(name, {})) for name, families in self.last.items()]
        if any(counted):
            self.past = [_sum([*self.past, *counted])]
        adapters = _adapters(now.values())
        self.past = [_of_adapters(families, adapters) for families in self.past]
        self.last = now
        families = _sum([*self.past, *self.last.values()])
        for name in MEANS:
            if name in families:
                families[name].samples = [
                    sample._replace(value=sample.value / len(texts)) for sample in families[name].samples
                ]
        registry = CollectorRegistry()
        registry.register(_Fixed(families.values()))
        return generate_latest(registry)


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _parse(text: bytes) -> Families:
    """The families of a text, but for the times at which counters were created."""
    return {
        family.name: family
        for family in text_string_to_metric_families(text.decode())
        if not family.name.endswith("_created")
    }


def _gone(before: Families, now: Families) -> Families:
    """Return what was counted before and is not there any more."""
    gone: Families = {}
    for name, family in before.items():
        kept = {(sample.name, *sample.labels.items()) for sample in now[name].samples} if name in now else set()
        samples = [sample for sample in family.samples if (sample.name, *sample.labels.items()) not in kept]
        if samples and family.type != "gauge":
            gone[name] = Metric(name, family.documentation, family.type)
            gone[name].samples = samples
    return gone


def _adapters(parts: Iterable[Families]) -> set[str | None]:
    """Return the names of adapters that have a label, and None."""
    families = (family for part in parts for family in part.values())
    return {None, *(sample.labels.get("adapter") for family in families for sample in family.samples)}


def _of_adapters(families: Families, adapters: set[str | None]) -> Families:
    """Return what was counted of these adapters, and of all requests."""
    kept: Families = {}
    for name, family in families.items():
        kept[name] = Metric(name, family.documentation, family.type)
        kept[name].samples = [sample for sample in family.samples if sample.labels.get("adapter") in adapters]
    return kept


def _sum(parts: Iterable[Families]) -> Families:
    totals: Families = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for families in parts:
        for name, family in families.items():
            totals.setdefault(name, Metric(name, family.documentation, family.type))
            sums = values.setdefault(name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                sums[key] = sums.get(key, 0) + sample.value
    for name, sums in values.items():
        for (sample_name, labels), value in sums.items():
            totals[name].add_sample(sample_name, dict(labels), value)
    return totals
