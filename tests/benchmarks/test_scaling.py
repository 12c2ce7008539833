"""benchmarks/scaling.py: simulated clusters keep the laws that a real one must."""

from __future__ import annotations

import pytest

from benchmarks.scaling import Costs, Deployment, capacity, simulate


def _tokens(replicas: int, costs: Costs, ingresses: int = 1, load: float = 1.3) -> float:
    rate = load * capacity(replicas, 8, costs)
    return simulate(Deployment(replicas, "load", 16, 8, ingresses), rate, 20, costs).tokens_per_second


def test_linear_up_to_the_limit_of_the_ingress() -> None:
    free = Costs(ingress_token=0)
    one = _tokens(1, free)
    assert _tokens(4, free) == pytest.approx(4 * one, rel=0.05)
    limited = Costs(ingress_token=1 / (2 * one))  # an ingress for two replicas
    assert _tokens(4, limited) == pytest.approx(2 * one, rel=0.05)
    assert _tokens(4, limited, ingresses=2) == pytest.approx(4 * one, rel=0.05)


def test_what_is_offered_is_done() -> None:
    costs = Costs()
    rate = 0.5 * capacity(2, 8, costs)
    found = simulate(Deployment(2, "cluster", 16, 8, 1), rate, 60, costs)
    assert found.tokens_per_second == pytest.approx(rate * 72, rel=0.15)  # 72 new tokens on average
    assert found.longest_queue <= 16
    assert 1 <= found.sets_per_step <= 8


def test_equal_beginnings_meet_where_they_are_cached() -> None:
    """As often as the bound lets them."""
    costs, hits = Costs(ingress_token=0), []
    for routing, bound in (("load", 4.0), ("prefix", 1.25), ("prefix", 4.0)):
        deployment = Deployment(4, routing, 32, 8, 1, prefix_tokens=512, cached_prefixes=8, bound=bound)
        hits.append(simulate(deployment, 0.8 * capacity(4, 8, costs, 512), 60, costs).prefix_hits)
    assert 0 < hits[0] < hits[2] - 0.1 < 0.9
    assert hits[1] < hits[2]
