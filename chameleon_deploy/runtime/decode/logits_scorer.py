"""Log-probabilities from logits, on a device and for the portable graph on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.runtime.decode.decoder import Decoder, parts
from chameleon_deploy.runtime.factors import RowFactors

BATCH_TOKENS = 256  # rows times width of one call; a longer row is alone. Larger calls are no faster


def logprobs_of_logits(
    decoder: Decoder, rows: Sequence[Sequence[int]], factors: RowFactors, max_rows: int | None = None
) -> list[FloatArray]:
    """Return log-probabilities as `Decoder.token_logprobs` does.

    max_rows  of one call; None is any number
    """
    logprobs = [np.empty(len(ids) - 1, np.float32) for ids in rows]
    lengths = np.array([len(values) for values in logprobs])
    for part in parts(lengths, BATCH_TOKENS, max_rows):
        own = factors.rows(np.arange(len(rows))[part])
        for start, logits in decoder.all_logits([ids[:-1] for ids in rows[part]], own):
            piece = slice(start, start + logits.shape[1])
            targets = [np.asarray(ids[1:][piece], np.int64) for ids in rows[part]]
            for found, values in zip(logprobs[part], logits.logprobs(targets), strict=True):
                found[piece] = values
    return logprobs
