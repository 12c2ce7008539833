"""Log-probabilities of the tokens of a prompt, each with its most probable alternatives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chameleon_deploy.runtime.decode.decoder import Decoder
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.sampling import Choice, log_probabilities


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
