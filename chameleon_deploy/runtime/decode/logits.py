"""Logits in memory or on a device: the token of the highest, and log-probabilities of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray, IntArray
from chameleon_deploy.errors import NumericError

SOFTMAX_POSITIONS = 8  # positions at a time, whose logits fit into the processor's cache


class Logits(Protocol):
    """Logits float32 [batch, vocab] or [batch, positions, vocab]; numpy.asarray copies all of them to memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def greedy(self) -> IntArray:
        """Return the token of the highest logit, ties to the lowest id.  -> int64 [batch] or [batch, positions]

        Raises NumericError if that logit is not finite.
        """

    def logprobs(self, targets: Sequence[IntArray]) -> Iterator[FloatArray]:
        """Return log softmax(logits)[target] of logits [batch, positions, vocab], row by row. The logits become
        invalid.

        targets  int64 [n] of each row, for its first n positions
        """

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]: ...


class HostLogits:
    """Logits in memory. See `Logits`."""

    def __init__(self, values: FloatArray, threads: int = 1) -> None:
        """Take values.

        threads  number of threads that compute the softmax of `logprobs`
        """
        self._values, self._threads = values, threads

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    def greedy(self) -> IntArray:
        flat = self._values.reshape(-1, self._values.shape[-1])
        best = flat.argmax(1)  # argmax returns the first NaN, if there is one
        if not np.isfinite(flat[np.arange(len(best)), best]).all():
            raise NumericError("the decoder produced logits that are not finite: check the factors")
        return np.asarray(best.reshape(self._values.shape[:-1]), np.int64)

    def logprobs(self, targets: Sequence[IntArray]) -> Iterator[FloatArray]:
        with ThreadPoolExecutor(self._threads) as executor:
            for row, ids in zip(self._values, targets, strict=True):
                pieces = [slice(start, start + SOFTMAX_POSITIONS) for start in range(0, len(ids), SOFTMAX_POSITIONS)]
                found = executor.map(_logprobs, (row[: len(ids)][p] for p in pieces), (ids[p] for p in pieces))
                yield np.concatenate([np.empty(0, np.float32), *found])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self._values.astype(dtype or np.float32, copy=bool(copy))


def _logprobs(logits: FloatArray, targets: IntArray) -> FloatArray:
    """Return log softmax(logits)[target].  [n, vocab], [n] -> [n]"""
    chosen = logits[np.arange(len(targets)), targets]
    highest = logits.max(1)
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which the caller reports
        logits -= highest[:, None]  # in place, since these logits have no other reader
        np.exp(logits, out=logits)
        # The sum is in float64: in float32 its rounding would show in the result, and differs from one library to
        # another.
        return np.asarray(chosen.astype(np.float64) - highest - np.log(logits.sum(1, dtype=np.float64)), np.float32)
