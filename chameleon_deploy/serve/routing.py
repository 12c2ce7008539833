"""Which of several replicas takes a request: the less loaded of two, or the one that a key belongs to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Literal

Routing = Literal["load", "cluster", "tenant", "prefix"]


def choose(queues: Mapping[str, int], key: str | None, bound: float) -> list[str]:
    """Return the replicas that may take a request, best first.

    queues  requests that each replica has, by its name
    key     requests of equal key go to one replica while its queue allows it; None takes the less loaded of two
            replicas that are drawn at random (Mitzenmacher, 2001)
    bound   how many times the mean queue one replica may have before a key moves on to the next in the key's own
            order, at least 1 (consistent hashing with bounded loads: Mirrokni et al., 2018)
    """
    if key is None:
        return sorted(random.sample(list(queues), min(2, len(queues))), key=queues.__getitem__)
    limit = bound * (sum(queues.values()) + 1) / len(queues)
    order = _order(list(queues), key)
    return sorted(order, key=lambda name: queues[name] + 1 > limit and queues[name] > 0)  # stable: False goes first


def _order(names: Sequence[str], key: str) -> list[str]:
    """Return the replicas by the hash of their name with the key: where one is added or removed, only its keys move."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}\0{name}".encode()).digest())
