"""The specification of runtime/sampling.py, written down once more in plain Python: slow, and without numpy's arrays.

`fault` names a mistake that an implementation could make, so that tests can show that their cases notice it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from chameleon_deploy.runtime.sampling_settings import Sampling

FAULTS = (
    "ties to the higher id",
    "top_k ties to the higher id",
    "top_p ties to the higher id",
    "drawn in order of weight",
    "presence counts the prompt",
    "frequency counts the prompt",
    "repetition forgets the prompt",
    "repetition forgets the generated",
    "frequency counts once",
    "penalties before repetition",
    "top_p before top_k",
)


def weight(logit: float, highest: float, temperature: float) -> float:
    t = max((logit - highest) * (2.0**-9 / temperature), -25 / 512)
    q = 1 + t * (1 + t * (1 / 2 + t * (1 / 6 + t * (1 / 24))))
    for _ in range(9):
        q = q * q
    return float(round(2.0**34 * q))


def changed_logits(
    logits: Sequence[float], prompt: Sequence[int], generated: Sequence[int], s: Sampling,
    allowed: Sequence[bool] | None = None, fault: str = "",
) -> list[np.float32]:  # fmt: skip
    values = [np.float32(logit) for logit in logits]
    counted = Counter(generated)
    if fault == "frequency counts once":
        counted = Counter(set(generated))
    if fault == "frequency counts the prompt":
        counted = Counter({i: n + prompt.count(i) for i, n in counted.items()})
    if fault == "presence counts the prompt":
        counted = Counter({i: counted[i] for i in {*prompt, *generated}})
    seen = set(prompt) | set(generated)
    if fault == "repetition forgets the prompt":
        seen = set(generated)
    if fault == "repetition forgets the generated":
        seen = set(prompt)

    def bias() -> None:
        for i, value in dict(s.logit_bias).items():
            values[i] = values[i] + np.float32(value)

    def mask() -> None:
        for i in range(len(values)):
            values[i] = values[i] if allowed is None or allowed[i] else np.float32(-np.inf)

    def repetition() -> None:
        penalty = np.float32(s.repetition_penalty)
        for i in seen if penalty != 1 else ():
            values[i] = values[i] / penalty if values[i] > 0 else values[i] * penalty

    def penalties() -> None:
        for i, count in counted.items():
            values[i] = values[i] - np.float32(s.presence_penalty + s.frequency_penalty * count)

    steps = [bias, mask, repetition, penalties]
    if fault == "penalties before repetition":
        steps = [bias, mask, penalties, repetition]
    for step in steps:
        step()
    return values


def plain_choose(
    logits: Sequence[float], prompt: Sequence[int], generated: Sequence[int], s: Sampling, u: float,
    allowed: Sequence[bool] | None = None, fault: str = "",
) -> int:  # fmt: skip
    values = [float(value) for value in changed_logits(logits, prompt, generated, s, allowed, fault)]
    ids = range(len(values))
    sign = -1 if fault == "ties to the higher id" else 1
    best = max(ids, key=lambda i: (values[i], -i * sign))
    if s.temperature == 0:
        return best
    weights = [weight(value, values[best], s.temperature) for value in values]

    def top_k(order: list[int]) -> list[int]:
        sign = -1 if fault == "top_k ties to the higher id" else 1
        return sorted(order, key=lambda i: (-values[i], i * sign))[: s.top_k or None]

    def top_p(order: list[int]) -> list[int]:
        if s.top_p == 1:
            return order
        sign = -1 if fault == "top_p ties to the higher id" else 1
        order = sorted(order, key=lambda i: (-weights[i], i * sign))
        enough = s.top_p * sum(weights[i] for i in order)
        count = next(n for n in range(1, len(order) + 1) if sum(weights[i] for i in order[:n]) >= enough)
        return order[:count]

    kept = top_k(top_p(list(ids))) if fault == "top_p before top_k" else top_p(top_k(list(ids)))
    kept.sort(key=(lambda i: (-weights[i], i)) if fault == "drawn in order of weight" else None)
    bound = u * sum(weights[i] for i in kept)
    return next(i for n, i in enumerate(kept) if sum(weights[j] for j in kept[: n + 1]) > bound)


def plain_log_probabilities(logits: Sequence[float], count: int) -> list[tuple[int, float]]:
    """(token id, log-probability) of the `count` highest, by their definition: math.exp and an exact sum."""
    highest = max(logits)
    log_total = math.log(math.fsum(math.exp(logit - highest) for logit in logits))
    order = sorted((i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: (-logits[i], i))
    return [(i, logits[i] - highest - log_total) for i in order[:count]]
