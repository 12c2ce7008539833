"""Choosing the next token, and log-probabilities, specified exactly once for Python and C++.

Both languages give the same bits. Every sum below is of integers under 2^53, held in float64, so it does not depend
on the order of addition; every other step is one IEEE 754 operation per element, without fused multiply-add.

Check. A raw logit that is NaN or +inf, or a row of nothing but -inf, is a NumericError.

Logits. Float32; each step applies to the result of the one before it.

    1. logit + bias for every token of logit_bias.
    2. -inf for every token that the mask `allowed` excludes (structured_outputs.py).
    3. Repetition penalty (arXiv 1909.05858): the logit of every token of the prompt or of the generated tokens is
       divided by the penalty where positive and multiplied by it otherwise.
    4. logit - float32(presence_penalty + frequency_penalty * count) for every generated token, where count is how
       often the row generated it. The prompt does not count. (OpenAI's API reference; vLLM does the same.)

temperature 0 chooses the highest logit, ties to the lowest id. Otherwise the token is drawn:

    5. top_k keeps the k highest logits, ties to the lower id.
    6. weight(x) = rint(2^34 * exp(x)) with x = (logit - highest logit) / temperature, from here on in float64, is

           t = max((logit - highest logit) * (2^-9 / temperature), -25 / 512)
           q = 1 + t * (1 + t * (1/2 + t * (1/6 + t * 1/24)))
           weight = rint(2^34 * q^512), where q is squared nine times

       (scaling and squaring: Moler and Van Loan, Nineteen dubious ways to compute the exponential of a matrix, SIAM
       Review 45, 2003). It is within one unit of 2^34 * exp(x), and 0 below x = -24.3. So the sums stay under 2^53
       for vocabularies of up to 2^19 tokens.
    7. top_p keeps, ordered by weight descending and id ascending, the shortest prefix whose sum of weights reaches
       top_p times the sum of all weights that top_k kept.
    8. With running sums c of the kept weights by ascending id: the first id with c > u * c_last.

u is counter-based, so it needs no state: output number `stream * 2^32 + step + 1` of SplitMix64
seeded with `seed`, its upper 53 bits times 2^-53.  (Steele, Lea, Flood: Fast splittable pseudorandom
number generators, OOPSLA 2014.)

Log-probabilities are those of the raw logits, before steps 1 to 8, as in OpenAI's API and vLLM: with total the sum of
exp(logit - highest logit) over the vocabulary, the log-probability of a token is

    float32((logit - highest logit) - log(total))

in float64, rounded once. exp and log are the library's, and the order of the sum is free: their last bits change the
float32 once in about 10^7 values. The alternatives are the n highest raw logits, ties to the lower id, without those of
-inf.

Implementation. numpy's exp takes a quarter of the time of the weights of step 6, and differs from them by less than one
unit. So a token is first chosen by exp. Where such differences could change it, steps 7 and 8 are repeated with the
exact weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import InputError, NumericError
from chameleon_deploy.runtime.sampling_settings import Sampling
from chameleon_deploy.runtime.structured_outputs import TokenMask

BoolArray = npt.NDArray[np.bool_]
WeightArray = npt.NDArray[np.float64]  # integers
IdArray = npt.NDArray[np.int64]

_MASK = 2**64 - 1
_UNIT = 2.0**34  # the weight of the highest logit
_ERROR = 1.0  # of a weight by exp: 0.5 is the rounding of the exact one, 0.05 its polynomial, the rest for sums
_BLOCK = 8192  # logits whose intermediate results fit the level 2 cache
_DRAWN = 256  # weights whose running sums are all computed
_BIN_SHIFT = 46  # 64 bins of weights for every power of two: all but 6 of the 52 bits of the fraction are dropped
_BIN_OF_1 = 1023 << (52 - _BIN_SHIFT)


SCORED = Sampling(ignore_eos=True, logprobs=0)  # of tokens that are given


class Choice(NamedTuple):
    """A chosen token; the other fields are None unless Sampling.logprobs asks for them.

    logprob       natural logarithm of the token's probability
    top_logprobs  (token id, log-probability) of the most probable tokens, highest first
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class TokenCounts:
    """The tokens of one row, counted for the penalties."""

    def __init__(self, prompt: Iterable[int], generated: Iterable[int] = ()) -> None:
        self._generated = Counter(generated)
        self._seen = dict.fromkeys([*prompt, *self._generated])

    def append(self, token_id: int) -> None:
        """Count a generated token."""
        self._generated[token_id] += 1
        self._seen[token_id] = None

    def seen(self) -> IdArray:
        """Return the distinct tokens of the prompt and the generated ones.  -> int64 [n]"""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    def generated(self) -> tuple[IdArray, IdArray]:
        """Return the distinct generated tokens, and how often each was generated.  -> int64 [n], int64 [n]"""
        size = len(self._generated)
        return np.fromiter(self._generated, np.int64, size), np.fromiter(self._generated.values(), np.int64, size)


class Sampler:
    """Chooses the tokens of one row, one after another.

    prompt  its token ids
    stream  number of the random stream, of those of the seed
    mask    where the row's text is constrained
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int], stream: int, mask: TokenMask | None = None) -> None:
        self.sampling, self._mask = sampling, mask
        self._stream, self._step = stream, 0
        self._counts = TokenCounts(prompt)

    @property
    def is_argmax(self) -> bool:
        """Return whether `choose` always returns the highest raw logit, for any row."""
        s = self.sampling
        return s.temperature == 0.0 and s.logprobs is None and self._mask is None and not _changes_logits(s)

    def choose(self, logits: FloatArray) -> Choice:
        """Return the next token, by the row's random number. It is not counted until `append`. See `choose` below."""
        s, allowed = self.sampling, None if self._mask is None else self._mask.allowed()
        token_id = choose(logits, self._counts, s, uniform(s.seed, self._stream, self._step), allowed)
        return Choice(token_id) if s.logprobs is None else log_probabilities(logits, token_id, s.logprobs)

    def append(self, token_id: int) -> None:
        """Append a token to the row."""
        self._step += 1
        self._counts.append(token_id)
        if self._mask is not None:
            self._mask.append(token_id)


class Given(Sampler):
    """Takes given tokens, one after another: a row with this sampler tells their log-probabilities."""

    def __init__(self, prompt: Iterable[int], token_ids: Sequence[int]) -> None:
        super().__init__(SCORED, prompt, 0)
        self._token_ids = token_ids

    def choose(self, logits: FloatArray) -> Choice:
        return log_probabilities(logits, self._token_ids[self._step], 0)


def uniform(seed: int, stream: int, step: int) -> float:
    """Return the number in [0, 1) that decides step `step` of stream `stream`."""
    z = (seed + (stream * 2**32 + step + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def choose(
    logits: FloatArray, counts: TokenCounts, sampling: Sampling, u: float, allowed: BoolArray | None = None
) -> int:
    """Return the next token id.

    logits   float32 [vocab]; not changed
    counts   the row's tokens so far
    u        in [0, 1), from `uniform`; not used when greedy
    allowed  bool [vocab], the tokens to choose from; None allows all

    Raises NumericError if a logit is not finite, and InputError if no token is allowed.
    """
    best = _argmax(logits)
    if allowed is not None or _changes_logits(sampling):
        logits = _changed(logits, counts, sampling, allowed)
        if allowed is not None and logits.max() == -np.inf:  # raw logits were finite
            raise InputError("the mask allows no token of finite logit: allow at least one")
        best = _argmax(logits)
    if sampling.temperature == 0.0:
        return best
    ids = None if allowed is None else np.flatnonzero(allowed)  # the weights of others are 0
    if 0 < sampling.top_k < len(logits):
        ids = _top_k(logits, sampling.top_k)
    candidates, highest = logits if ids is None else logits[ids], float(logits[best])
    place = _choose_place(_exponentials(candidates, highest, sampling.temperature), sampling.top_p, u, _ERROR)
    if place is None:
        place = _choose_place(_weights(candidates, highest, sampling.temperature), sampling.top_p, u)
    assert place is not None  # noqa: S101  (exact weights always decide)
    return place if ids is None else int(ids[place])


def log_probabilities(logits: FloatArray, token_id: int, count: int) -> Choice:
    """Return the log-probability of a chosen token, and the `count` most probable tokens with theirs.

    logits  float32 [vocab], raw

    Raises NumericError if a logit is not finite.
    """
    highest = float(logits[_argmax(logits)])
    log_total = math.log(float(_exponentials(logits, highest, 1.0).sum()) / _UNIT)

    def logprob(id_: int) -> float:
        return float(np.float32(float(logits[id_]) - highest - log_total))

    return Choice(token_id, logprob(token_id), tuple((id_, logprob(id_)) for id_ in _highest(logits, count)))


def _argmax(logits: FloatArray) -> int:
    best = int(logits.argmax())  # argmax returns the first NaN, if there is one
    if not np.isfinite(logits[best]):
        raise NumericError("the decoder produced logits that are not finite: check the factors")
    return best


def _highest(logits: FloatArray, count: int) -> list[int]:
    """Return the ids of the highest logits, ties to the lower id, without those of -inf."""
    rest, ids = logits.copy(), []
    for _ in range(min(count, len(rest))):
        best = int(rest.argmax())  # repeating this five times is faster than one partition
        if rest[best] == -np.inf:
            break
        ids.append(best)
        rest[best] = -np.inf
    return ids


def _changes_logits(s: Sampling) -> bool:
    return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0 or bool(s.logit_bias)


@np.errstate(over="ignore")  # an infinite result is detected afterwards
def _changed(logits: FloatArray, counts: TokenCounts, s: Sampling, allowed: BoolArray | None) -> FloatArray:
    """Return the logits after steps 1 to 4."""
    logits = logits.copy()
    ids, biases = s.biases
    logits[ids] += biases
    if allowed is not None:
        logits[~allowed] = -np.inf
    if s.repetition_penalty != 1.0:
        penalty, seen = np.float32(s.repetition_penalty), counts.seen()
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if s.presence_penalty != 0.0 or s.frequency_penalty != 0.0:
        ids, times = counts.generated()
        logits[ids] -= (s.presence_penalty + s.frequency_penalty * times).astype(np.float32)
    return logits


def _top_k(logits: FloatArray, k: int) -> IdArray:
    """Return the ids of the k highest logits, ties to the lower id, ascending."""
    threshold = np.partition(logits, len(logits) - k)[len(logits) - k]
    above = np.flatnonzero(logits > threshold)
    ties = np.flatnonzero(logits == threshold)[: k - len(above)]
    return np.sort(np.concatenate([above, ties]))


def _exponentials(logits: FloatArray, highest: float, temperature: float) -> WeightArray:
    """Return 2^34 * exp((logit - highest) / temperature), which differs from the weight by less than _ERROR."""
    x = logits.astype(np.float64)
    x -= highest
    x *= 1.0 / temperature
    np.exp(x, out=x)
    x *= _UNIT
    return x


def _weights(logits: FloatArray, highest: float, temperature: float) -> WeightArray:
    weights = np.empty(len(logits))
    for start in range(0, len(logits), _BLOCK):
        t = logits[start : start + _BLOCK].astype(np.float64)
        q = weights[start : start + _BLOCK]
        t -= highest
        t *= 2.0**-9 / temperature
        np.maximum(t, -25 / 512, out=t)
        np.multiply(t, 1 / 24, out=q)
        for coefficient in (1 / 6, 1 / 2, 1.0):
            q += coefficient
            q *= t
        q += 1.0
        for _ in range(9):
            np.multiply(q, q, out=q)
        q *= _UNIT
        np.rint(q, out=q)
    return weights


def _choose_place(weights: WeightArray, top_p: float, u: float, error: float = 0.0) -> int | None:
    """Return the index that steps 7 and 8 choose, or None if errors of the weights could change it.

    error  bound on the error of each weight; exact weights always give an index
    """
    margin = error * len(weights)  # bound on the error of every difference of sums below
    if top_p == 1.0:
        return _draw(weights, u, margin)
    kept = _top_p(weights, top_p, error)
    if kept is None:
        return None
    place = _draw(weights[kept], u, margin)
    return None if place is None else int(kept[place])


def _top_p(weights: WeightArray, top_p: float, error: float = 0.0) -> IdArray | None:
    """Return the indices of the weights that top_p keeps, ascending, or None as above.

    A histogram gives the bin of the lowest weight that is kept; only the weights of that bin are sorted.
    """
    total, count = float(weights.sum()), len(weights)
    enough, margin = top_p * total, error * count
    # Lighter ones sum to less than what is left out in any case. Where they are most, the others are all that counts.
    is_heavy = weights >= (1.0 - top_p) * total / (2 * count)
    heavy = np.flatnonzero(is_heavy) if 4 * np.count_nonzero(is_heavy) < count else None
    candidates = weights if heavy is None else weights[heavy]
    bins = candidates.view(np.int64) >> _BIN_SHIFT  # the bits of a positive number rise with it
    np.maximum(bins, _BIN_OF_1, out=bins)
    bins -= _BIN_OF_1
    masses = np.cumsum(np.bincount(bins, candidates)[::-1])
    bin_ = int(np.searchsorted(masses, enough))
    above = float(masses[bin_ - 1]) if bin_ else 0.0
    members = np.flatnonzero(bins == len(masses) - 1 - bin_)
    descending = np.sort(candidates[members])[::-1]
    running = above + np.cumsum(descending)
    place = int(np.searchsorted(running, enough))
    if error and not _is_certain(above, running, place, enough, margin):
        return None
    last = descending[place]
    near = np.count_nonzero(candidates >= last - 2 * error) - np.count_nonzero(candidates > last + 2 * error)
    if error and near > 1:  # their order is not certain
        return None
    kept = candidates > last
    ties = members[candidates[members] == last]
    kept[ties[: np.count_nonzero(descending[: place + 1] == last)]] = True
    ids = np.flatnonzero(kept)
    return ids if heavy is None else heavy[ids]


def _draw(weights: WeightArray, u: float, margin: float = 0.0) -> int | None:
    """Return the first index whose running sum exceeds u times the sum, or None if that is by less than the margin.

    Running sums are computed over blocks, then within one block: the sum of a block needs no chain of dependent
    additions.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _DRAWN))
    running = np.cumsum(sums)
    bound = u * running[-1]
    block = int(np.searchsorted(running, bound, side="right"))
    start, before = block * _DRAWN, running[block] - sums[block]
    within = before + np.cumsum(weights[start : start + _DRAWN])
    place = int(np.searchsorted(within, bound, side="right"))
    return start + place if not margin or _is_certain(before, within, place, bound, margin) else None


def _is_certain(before: float, running: WeightArray, place: int, bound: float, margin: float) -> bool:
    """Return whether `place` is the first whose running sum exceeds the bound, even if that changed by the margin.

    before  the running sum before the first place
    """
    lower = running[place - 1] if place else before
    return place < len(running) and bool(bound - lower > margin and running[place] - bound > margin)
