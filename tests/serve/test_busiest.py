"""Labels of adapters: bounded, and what is counted under one stays there."""

from __future__ import annotations

import random
from collections import Counter

from chameleon_deploy.runtime.engine.iteration import FinishedRow, Iteration
from chameleon_deploy.serve.metrics import OTHERS, PERIOD, Busiest, Metrics


def test_a_busy_name_takes_the_label_of_the_least_used() -> None:
    forgotten = list[str]()
    busiest = Busiest(forgotten.append, labelled=2)
    assert [busiest.label(name) for name in "aabc"] == ["a", "a", "b", OTHERS]
    assert [busiest.label("c") for _ in range(2)] == [OTHERS, "c"]
    assert forgotten == ["b"]
    assert busiest.label("b") == OTHERS


def test_names_of_the_same_use_do_not_take_turns() -> None:
    forgotten = list[str]()
    busiest = Busiest(forgotten.append, labelled=2)
    for _ in range(PERIOD):
        for name in "abc":
            busiest.label(name)
    assert forgotten == []


def test_labels_and_what_is_remembered_are_bounded() -> None:
    """Over names by Zipf's law, whose busiest have labels, and names that are never used again."""
    chance = random.Random(1)
    labels = Counter[str]()
    busiest = Busiest(labels.__delitem__, labelled=8)
    zipf = [1 / (rank + 1) for rank in range(64)]
    for number in range(3 * PERIOD):
        (rank,) = chance.choices(range(64), zipf)
        for name in (f"a{rank}", f"once{number}"):
            labels[busiest.label(name)] += 1
        assert len(labels) <= 8 + 1
    assert {"a0", "a1", "a2"} < set(labels)
    assert len(busiest._uses) < 3 * PERIOD


def test_a_label_that_is_forgotten_leaves_the_metrics() -> None:
    metrics = Metrics()
    metrics._busiest = Busiest(metrics._forget_adapter, labelled=1)

    def finish(*adapters: str) -> str:
        row = FinishedRow("static", 0, "length", 5, 7, 0.5, 0.1, 0.2, adapters)
        metrics.observe(Iteration(finished=[row]))
        return metrics.text().decode()

    assert 'chameleon_adapter_generation_tokens_total{adapter="a"} 7.0' in finish("a")
    for _ in range(2):
        assert 'adapter="b"' not in finish("b")
    text = finish("b")
    assert 'adapter="a"' not in text
    assert 'chameleon_adapter_requests_total{adapter="(others)"} 2.0' in text
    assert 'chameleon_adapter_request_queue_time_seconds_sum{adapter="b"} 0.1' in text
    cancelled = FinishedRow("static", 0, "cancelled", 5, 0, 0.5, None, None, ("b",))
    metrics.observe(Iteration(finished=[cancelled]))
    text = metrics.text().decode()
    assert 'chameleon_adapter_requests_total{adapter="b"} 2.0' in text
    assert 'chameleon_adapter_time_to_first_token_seconds_count{adapter="b"} 1.0' in text
