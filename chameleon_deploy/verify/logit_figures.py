"""How far two models lie apart, in logits, scores and factors: what the numeric gates limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.runtime import Score
from chameleon_deploy.runtime.factors import RowFactors

LOGITS = 2**20  # that are compared together: 8 MB in float64


class LogitFigures:
    """Accumulates the comparison of two sets of logits, in slices, so that no float64 copy is large.

    max_abs  largest difference of two logits
    kl       per position, KL divergence of the actual from the expected distribution
    nll      sums over targets, of the actual and of the expected logits
    """

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.targets = 0
        self.kl: list[Tensor] = []
        self.nll = [0.0, 0.0]
        self._gaps: list[Tensor] = []  # per position, between the reference's two highest logits
        self._same_top1: list[Tensor] = []
        self._variances: list[Tensor] = []

    @property
    def positions(self) -> int:
        return sum(map(len, self.kl))

    @property
    def scale(self) -> float:
        """The scale of the expected logits, see `logit_scale`."""
        return _scale(torch.cat(self._variances))

    def top1(self, gap: float) -> tuple[int, int]:
        """Positions where the reference's gap exceeds `gap` times the scale, and how many agree in the best token."""
        clear = torch.cat(self._gaps) > gap * self.scale
        return int(clear.sum()), int(torch.cat(self._same_top1)[clear].sum())

    def add(self, actual: Tensor, expected: Tensor, following: Tensor) -> None:
        """Logits [positions, vocab] of a piece of a text and the ids that follow each: one fewer at the text's end."""
        step = max(1, LOGITS // actual.shape[1])
        for start in range(0, len(actual), step):
            part = slice(start, start + step)
            self.max_abs = largest([self.max_abs, max_abs(actual[part].numpy(), expected[part].numpy())])
            top = expected[part].topk(2).values
            self._gaps.append(top[:, 0] - top[:, 1])
            self._same_top1.append(actual[part].argmax(1) == expected[part].argmax(1))
            self._variances.append(expected[part].double().var(1, correction=0))
            q, p = actual[part].double().log_softmax(1), expected[part].double().log_softmax(1)
            self.kl.append((p.exp() * (p - q)).sum(1))
            targets = following[part, None]
            self.targets += len(targets)
            for i, logprobs in enumerate((q, p)):
                self.nll[i] -= float(logprobs[: len(targets)].gather(1, targets).sum())


def logit_scale(rows: Iterable[FloatArray]) -> float:
    """The scale of logits [positions, vocab]: a quarter of their standard deviation over the vocabulary, at least 1.

    The deviation is the root mean square over positions. Logits of a few units have scale 1, so that an absolute
    rounding error counts in full; a strong update makes logits of hundreds, whose rounding errors grow with them.
    """
    return _scale(torch.cat([torch.from_numpy(np.asarray(row)).double().var(1, correction=0) for row in rows]))


def _scale(variances: Tensor) -> float:
    return max(1.0, float(variances.mean().sqrt()) / 4)


def percentile_interval(values: Tensor, share: float, confidence: float = 0.95) -> tuple[float, float | None]:
    """Return two of the values between which the quantile of the population lies; None where none is large enough.

    Of n independent values the number below the quantile is binomial, whatever their distribution, so that order
    statistics bound it (David and Nagaraja, Order Statistics, section 7.1). Positions of one text are not quite
    independent, so that the interval is rather too narrow. NaN sorts last.

    share  of the population below the quantile
    """
    count, tail = len(values), (1 - confidence) / 2
    below = torch.arange(count + 1, dtype=torch.float64)
    pmf = torch.distributions.Binomial(count, torch.tensor(share, dtype=torch.float64)).log_prob(below).exp()
    cdf = pmf.cumsum(0)
    first = int((cdf <= tail).sum())  # the largest index, from 1, that is at most the quantile but for the tail
    last = int((cdf < 1 - tail).sum()) + 1
    ordered = values.sort().values
    return float(ordered[max(first, 1) - 1]), float(ordered[last - 1]) if last <= count else None


def max_abs(a: Any, b: Any) -> float:
    """The largest difference, 0 of nothing, NaN where one is NaN."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0.0))


def largest(values: Iterable[float]) -> float:
    """The largest of values that are not negative, 0 of nothing, NaN where one is NaN: Python's max may drop it."""
    return float(np.max(list(values), initial=0.0))


def factor_difference(ours: RowFactors, theirs: RowFactors) -> float:
    """The largest between the factors of each row, relative to the reference's largest of the tensor."""
    pairs = list(zip(ours.factor_ids, theirs.factor_ids, strict=True))
    differences = []
    for name, stack in theirs.sets.tensors.items():
        found, expected = np.asarray(ours.sets.tensors[name]), np.asarray(stack)
        difference = largest(max_abs(found[i], expected[j]) for i, j in pairs)
        differences.append(difference / (max_abs(expected, 0) or 1))
    return largest(differences)


def score_difference(scores: Sequence[Score], rows_logits: Iterable[FloatArray]) -> float:
    """Between token log-probabilities and what the logits of the same rows say."""
    differences = []
    for score, logits in zip(scores, rows_logits, strict=True):
        logprobs = torch.from_numpy(logits[:-1]).double().log_softmax(1)
        expected = logprobs.gather(1, torch.tensor(score.token_ids[1:], dtype=torch.int64)[:, None])[:, 0]
        differences.append(max_abs(score.token_logprobs, expected.numpy()))
    return largest(differences)
