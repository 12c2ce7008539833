"""Log-probabilities of given texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from chameleon_deploy.bundle import FloatArray
from chameleon_deploy.errors import NumericError
from chameleon_deploy.runtime.adaptation import Adaptation, IntArray
from chameleon_deploy.runtime.decoder import Decoder, Logits
from chameleon_deploy.runtime.device_logits import DeviceLogits

BATCH_TOKENS = 256  # rows times width of one pass; a longer row goes alone. Larger ones are no faster
SOFTMAX_POSITIONS = 8  # at a time, whose logits stay in the processor's cache


@dataclass(frozen=True)
class Score:
    """token_logprobs[i] is the natural logarithm of the probability of token_ids[i + 1] given token_ids[0..i]."""

    token_ids: list[int]
    token_logprobs: list[float]
    cluster_id: int

    @property
    def logprob(self) -> float:
        """Of the whole text given its first token."""
        return math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """NaN for a text of one token, which predicts nothing."""
        return math.exp(-self.logprob / len(self.token_logprobs)) if self.token_logprobs else math.nan


def score_rows(rows: Sequence[Sequence[int]], decoder: Decoder, adaptation: Adaptation, threads: int) -> list[Score]:
    """Scores in the order of the rows. The batch was adapted as a whole; it is decoded in passes of bounded memory.

    threads  how many take the softmax of a pass
    """
    with ThreadPoolExecutor(threads) as executor:
        logprobs = _logprobs_of_rows(rows, decoder, adaptation, executor)
    return [
        Score(list(ids), values.tolist(), int(cluster_id))
        for ids, values, cluster_id in zip(rows, logprobs, adaptation.cluster_ids, strict=True)
    ]


def _logprobs_of_rows(
    rows: Sequence[Sequence[int]], decoder: Decoder, adaptation: Adaptation, executor: Executor
) -> list[FloatArray]:
    logprobs: list[FloatArray] = [np.empty(0, np.float32)] * len(rows)
    for members in _passes([len(ids) - 1 for ids in rows], decoder.max_rows or len(rows)):
        adapted = adaptation.rows(members)
        logprobs_of = {int(row): np.empty(len(rows[row]) - 1, np.float32) for row in members}
        for start, logits in decoder.all_logits([rows[row][:-1] for row in members], adapted):
            piece = slice(start, start + logits.shape[1])
            targets = [np.asarray(rows[row][1:][piece], np.int64) for row in members]
            for row, values in zip(members, _read(logits, targets, executor), strict=True):
                logprobs_of[int(row)][start : start + len(values)] = values
        for row, values in logprobs_of.items():
            if not np.isfinite(values).all():
                raise NumericError(f"text {row}: the decoder produced logits that are not finite: check the factors")
            logprobs[row] = values
    return logprobs


def _read(logits: Logits, targets: list[IntArray], executor: Executor) -> Iterator[FloatArray]:
    """Log-probabilities of each row's targets, which end where the row does; on the device where the logits are."""
    if isinstance(logits, DeviceLogits):
        padded = np.zeros(logits.shape[:2], np.int64)
        for i, ids in enumerate(targets):
            padded[i, : len(ids)] = ids
        yield from (row[: len(ids)] for row, ids in zip(logits.logprobs(padded), targets, strict=True))
    else:
        for row, ids in zip(logits, targets, strict=True):
            pieces = [slice(start, start + SOFTMAX_POSITIONS) for start in range(0, len(ids), SOFTMAX_POSITIONS)]
            found = executor.map(_logprobs, (row[: len(ids)][p] for p in pieces), (ids[p] for p in pieces))
            yield np.concatenate([np.empty(0, np.float32), *found])


def _passes(lengths: list[int], max_rows: int) -> list[IntArray]:
    """Rows with something to predict, in passes of similar length, so that little is padding."""
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: lengths[row])
    passes: list[list[int]] = []
    for row in order:
        if not passes or (len(passes[-1]) + 1) * lengths[row] > BATCH_TOKENS or len(passes[-1]) == max_rows:
            passes.append([])
        passes[-1].append(row)
    return [np.array(members) for members in passes]


def _logprobs(logits: FloatArray, targets: IntArray) -> FloatArray:
    """log softmax(logits)[target].  [n, vocab], [n] -> [n]"""
    chosen = logits[np.arange(len(targets)), targets]
    highest = logits.max(1)
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which the caller reports
        logits -= highest[:, None]  # in place: these logits have no other reader
        np.exp(logits, out=logits)
        # The sum in float64: in float32 its rounding shows in the result, and differs from one library to another.
        return np.asarray(chosen.astype(np.float64) - highest - np.log(logits.sum(1, dtype=np.float64)), np.float32)
