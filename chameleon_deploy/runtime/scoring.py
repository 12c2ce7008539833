"""Log-probabilities of given texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import NumericError
from chameleon_deploy.runtime.adaptation import Adaptation
from chameleon_deploy.runtime.decode.decoder import Decoder
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.sampling import Choice, log_probabilities


@dataclass(frozen=True)
class Score:
    """token_logprobs[i] is the natural logarithm of the probability of token_ids[i + 1] given token_ids[0..i]."""

    token_ids: list[int]
    token_logprobs: list[float]
    cluster_id: int

    @property
    def logprob(self) -> float:
        """Return the log-probability of the whole text given its first token."""
        return math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """Return the perplexity; NaN for a text of one token, which predicts nothing."""
        return math.exp(-self.logprob / len(self.token_logprobs)) if self.token_logprobs else math.nan


def score_rows(rows: Sequence[Sequence[int]], decoder: Decoder, adaptation: Adaptation) -> list[Score]:
    """Return scores in the order of the rows. The batch is adapted as a whole and decoded in calls of bounded memory.

    Raises NumericError if the logits of a row are not finite.
    """
    lengths = np.array([len(ids) for ids in rows])
    # A text of one token has nothing to predict. Similar lengths are adjacent, which minimises padding.
    members = np.array([row for row in np.argsort(lengths, kind="stable") if lengths[row] > 1], np.int64)
    logprobs: list[FloatArray] = [np.empty(0, np.float32)] * len(rows)
    if len(members):
        found = decoder.token_logprobs([rows[row] for row in members], adaptation.factors.rows(members))
        for row, values in zip(members, found, strict=True):
            if not np.isfinite(values).all():
                raise NumericError(f"text {row}: the decoder produced logits that are not finite: check the factors")
            logprobs[row] = values
    return [
        Score(list(ids), values.tolist(), int(cluster_id))
        for ids, values, cluster_id in zip(rows, logprobs, adaptation.cluster_ids, strict=True)
    ]


def prompt_logprobs(ids: Sequence[int], decoder: Decoder, factors: RowFactors, count: int) -> list[Choice]:
    """Return the choices that would have generated a text after its first token, as `Sampling.logprobs` reports
    them.
    """
    choices: list[Choice] = []
    if len(ids) == 1:
        return choices
    for start, logits in decoder.all_logits([ids[:-1]], factors):
        rows = np.asarray(logits)[0]
        choices += [log_probabilities(row, ids[start + i + 1], count) for i, row in enumerate(rows)]
    return choices
