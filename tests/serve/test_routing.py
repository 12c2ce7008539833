"""The choice of a replica: bounds, affinity, and what moves when replicas come and go."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from chameleon_deploy.serve.routing import choose

NAMES = [f"replica{i}" for i in range(8)]
BOUND = 1.25


def _simulate(keys: list[str | None], in_flight: int) -> tuple[int, Counter[tuple[str | None, str]]]:
    """Route requests of which so many are being worked on at a time. Return the longest queue and who took which."""
    queues, running, taken, longest = dict.fromkeys(NAMES, 0), list[str](), Counter[tuple[str | None, str]](), 0
    for key in keys:
        if len(running) == in_flight:
            queues[running.pop(random.randrange(in_flight))] -= 1
        name = choose(queues, key, BOUND)[0]
        queues[name] += 1
        running.append(name)
        taken[key, name] += 1
        longest = max(longest, queues[name])
    return longest, taken


def _zipf(count: int, clusters: int) -> list[str | None]:
    weights = [1 / (rank + 1) ** 1.2 for rank in range(clusters)]
    return [str(cluster) for cluster in random.choices(range(clusters), weights, k=count)]


@pytest.mark.parametrize("clusters", [1, 4, 64])
def test_no_queue_exceeds_its_bound(clusters: int) -> None:
    random.seed(clusters)
    longest, _ = _simulate(_zipf(10_000, clusters), in_flight=64)
    assert longest <= BOUND * 64 / len(NAMES) + 1


def test_load_alone_is_balanced() -> None:
    random.seed(0)
    longest, taken = _simulate([None] * 10_000, in_flight=64)
    assert longest <= 64 / len(NAMES) + 4
    assert max(taken.values()) < 1.2 * 10_000 / len(NAMES)


def test_a_key_stays_where_it_is() -> None:
    idle = dict.fromkeys(NAMES, 0)
    homes = {key: choose(idle, key, BOUND)[0] for key in map(str, range(200))}
    assert set(homes.values()) == set(NAMES)
    fewer = {name: 0 for name in NAMES if name != NAMES[3]}
    for key, home in homes.items():
        assert choose(idle, key, BOUND)[0] == home
        assert (choose(fewer, key, BOUND)[0] == home) == (home != NAMES[3])  # only keys of the one that went have moved


def test_every_replica_is_offered() -> None:
    """One that refuses leaves the others: a full favourite never blocks a request."""
    queues = {name: i * i for i, name in enumerate(NAMES)}
    assert sorted(choose(queues, "key", BOUND)) == sorted(NAMES)
    assert len(choose(queues, None, BOUND)) == 2
    assert choose({"one": 5}, None, BOUND) == choose({"one": 5}, "key", BOUND) == ["one"]
