"""Choosing the next token, specified so exactly that Python and C++ choose the same one.

    1. Repetition penalty (float32): the logit of every token in the prompt or already generated is
       divided by the penalty where positive and multiplied where negative (arXiv 1909.05858).
    2. temperature 0: the highest logit, ties to the lowest id. Done.
    3. z = logit / temperature, in float64 from here on.
    4. top_k: keep the k highest z, ties to the lower id.
    5. w = exp(z - max z). top_p: of what is kept, ordered by z descending and id ascending, keep the
       shortest prefix whose running sum of w reaches top_p times the sum.
    6. Over the kept ids ascending, with running sums c of w: the first id with c > u * c_last.

u is counter-based, so it needs no state: output number `stream * 2^32 + step + 1` of SplitMix64
seeded with `seed`, its upper 53 bits times 2^-53.  (Steele, Lea, Flood: Fast splittable pseudorandom
number generators, OOPSLA 2014.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chameleon_deploy.bundle import FloatArray
from chameleon_deploy.errors import InputError, NumericError

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a row are chosen and when it stops.

    temperature         0 is greedy, else at least 1e-5
    top_k               0 keeps all
    top_p               1 keeps all
    repetition_penalty  1 leaves the logits alone
    seed                0 <= seed < 2**64; the same seed gives the same tokens
    stop_token_ids      stop after one of these, besides the model's end of text
    stop                stop before one of these strings
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        checks = {
            "temperature": self.temperature == 0 or 1e-5 <= self.temperature < np.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": np.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "seed": 0 <= self.seed < 2**64,
            "stop": not isinstance(self.stop, str) and all(self.stop),
        }
        for name, good in checks.items():
            if not good:
                raise InputError(f"{name}={getattr(self, name)!r} is out of range")


def uniform(seed: int, stream: int, step: int) -> float:
    """The number in [0, 1) that decides step `step` of stream `stream`."""
    z = (seed + (stream * 2**32 + step + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def choose(logits: FloatArray, seen: npt.NDArray[np.int64], sampling: Sampling, u: float) -> int:
    """The next token id.

    logits  float32 [vocab]
    seen    int64 [n], the row's tokens so far, each at least once
    u       in [0, 1), from `uniform`; not used when greedy

    Raises NumericError when a logit is not finite.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = np.float32(sampling.repetition_penalty)
        logits = logits.copy()
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    best = int(logits.argmax())  # argmax gives the first NaN, if there is one
    if not np.isfinite(logits[best]):
        raise NumericError("the decoder produced logits that are not finite: check the factors")
    if sampling.temperature == 0.0:
        return best
    z = logits.astype(np.float64) / sampling.temperature
    ids = np.arange(len(z))
    if 0 < sampling.top_k < len(z):
        threshold = np.partition(z, len(z) - sampling.top_k)[len(z) - sampling.top_k]
        above = np.flatnonzero(z > threshold)
        ties = np.flatnonzero(z == threshold)[: sampling.top_k - len(above)]
        ids = np.sort(np.concatenate([above, ties]))
    weights = np.exp(z[ids] - z[best])
    if sampling.top_p < 1.0:
        order = np.lexsort((ids, -z[ids]))
        sums = np.cumsum(weights[order])
        prefix = int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1
        kept = np.sort(order[:prefix])
        ids, weights = ids[kept], weights[kept]
    sums = np.cumsum(weights)
    return int(ids[min(int(np.searchsorted(sums, u * sums[-1], side="right")), len(ids) - 1)])
