"""How far two models lie apart, in logits, scores and factors: what the numeric gates limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.bundle import LM_HEAD, FloatArray, factor_names
from chameleon_deploy.reference.inference import ReferenceAdaptation
from chameleon_deploy.runtime import Score
from chameleon_deploy.runtime.factors import RowFactors


class LogitFigures:
    """Accumulates the comparison of two sets of logits, in slices, so that no float64 copy is large."""

    def __init__(self, top1_gap: float) -> None:
        self.top1_gap = top1_gap
        self.max_abs = 0.0
        self.agreed = self.clear = self.targets = 0
        self.kl: list[Tensor] = []
        self.nll = [0.0, 0.0]  # actual, expected

    @property
    def positions(self) -> int:
        return sum(map(len, self.kl))

    def add(self, actual: Tensor, expected: Tensor, following: Tensor) -> None:
        """Logits [positions, vocab] of a piece of a text and the ids that follow each: one fewer at the text's end."""
        for start in range(0, len(actual), 64):
            part = slice(start, start + 64)
            self.max_abs = largest([self.max_abs, max_abs(actual[part].numpy(), expected[part].numpy())])
            top = expected[part].topk(2).values
            sure = top[:, 0] - top[:, 1] > self.top1_gap
            self.agreed += int((actual[part].argmax(1) == expected[part].argmax(1))[sure].sum())
            self.clear += int(sure.sum())
            q, p = actual[part].double().log_softmax(-1), expected[part].double().log_softmax(-1)
            self.kl.append((p.exp() * (p - q)).sum(-1))
            targets = following[part, None]
            self.targets += len(targets)
            for i, logprobs in enumerate((q, p)):
                self.nll[i] -= float(logprobs[: len(targets)].gather(1, targets).sum())


def max_abs(a: Any, b: Any) -> float:
    """The largest difference, 0 of nothing, NaN where one is NaN."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0.0))


def largest(values: Iterable[float]) -> float:
    """The largest of values that are not negative, 0 of nothing, NaN where one is NaN: Python's max may drop it."""
    return float(np.max(list(values), initial=0.0))


def factor_difference(ours: RowFactors, theirs: ReferenceAdaptation, alpha: float) -> float:
    """Between the factors of each row."""
    lora_A, lora_B = (np.asarray(ours.sets.tensors[name]) for name in factor_names(LM_HEAD))
    A, B = theirs.lora_A.numpy(), alpha * theirs.lora_B.numpy().swapaxes(1, 2)
    return largest(
        difference
        for i, j in zip(ours.factor_ids, theirs.factor_ids.numpy(), strict=True)
        for difference in (max_abs(lora_A[i], A[j]), max_abs(lora_B[i], B[j]))
    )


def score_difference(scores: Sequence[Score], rows_logits: Iterable[FloatArray]) -> float:
    """Between token log-probabilities and what the logits of the same rows say."""
    differences = []
    for score, logits in zip(scores, rows_logits, strict=True):
        logprobs = torch.from_numpy(logits[:-1]).double().log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(score.token_ids[1:], dtype=torch.int64)[:, None])[:, 0]
        differences.append(max_abs(score.token_logprobs, expected.numpy()))
    return largest(differences)
