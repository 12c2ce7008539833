"""Log-probabilities from logits: on a device, and of the portable graph on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np

from chameleon_deploy.bundle import FloatArray
from chameleon_deploy.runtime.adaptation import Adaptation, IntArray
from chameleon_deploy.runtime.decoder import Decoder, Logits, parts
from chameleon_deploy.runtime.device.logits import DeviceLogits

BATCH_TOKENS = 256  # rows times width of one call; a longer row goes alone. Larger ones are no faster
SOFTMAX_POSITIONS = 8  # at a time, whose logits stay in the processor's cache


def logprobs_of_logits(
    decoder: Decoder,
    rows: Sequence[Sequence[int]],
    adaptation: Adaptation,
    max_rows: int | None = None,
    threads: int = 1,
) -> list[FloatArray]:
    """See `Decoder.token_logprobs`.

    max_rows  of one call; None is any number
    threads   how many take the softmax of logits that are not on a device
    """
    logprobs = [np.empty(len(ids) - 1, np.float32) for ids in rows]
    lengths = np.array([len(values) for values in logprobs])
    with ThreadPoolExecutor(threads) as executor:
        for part in parts(lengths, BATCH_TOKENS, max_rows):
            adapted = adaptation.rows(np.arange(len(rows))[part])
            for start, logits in decoder.all_logits([ids[:-1] for ids in rows[part]], adapted):
                piece = slice(start, start + logits.shape[1])
                targets = [np.asarray(ids[1:][piece], np.int64) for ids in rows[part]]
                for found, values in zip(logprobs[part], _read(logits, targets, executor), strict=True):
                    found[piece] = values
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


def _logprobs(logits: FloatArray, targets: IntArray) -> FloatArray:
    """log softmax(logits)[target].  [n, vocab], [n] -> [n]"""
    chosen = logits[np.arange(len(targets)), targets]
    highest = logits.max(1)
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which the caller reports
        logits -= highest[:, None]  # in place: these logits have no other reader
        np.exp(logits, out=logits)
        # The sum in float64: in float32 its rounding shows in the result, and differs from one library to another.
        return np.asarray(chosen.astype(np.float64) - highest - np.log(logits.sum(1, dtype=np.float64)), np.float32)
