"""The decoder's interface, independent of how its graph stores the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray, IntArray
from chameleon_deploy.runtime.decode.logits import Logits
from chameleon_deploy.runtime.factors import RowFactors


class Decoder(Protocol):
    """A decoder whose one session serves prefill, decoding and scoring. Threads share it.

    It generates with `Slots` (SharedCacheDecoder) or as a StaticDecoder. Factors are in the decoder's memory
    (`Backend.place`), with one entry of `factor_ids` for each row.
    """

    def all_logits(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[tuple[int, Logits]]:
        """Yield logits of every position in pieces: (first position, float32 [batch, positions, vocab])."""

    def token_logprobs(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> list[FloatArray]:
        """Return for each row the log-probability of each token after the first, float32 [length - 1].

        rows  of at least two tokens; similar lengths should be adjacent, since they share a call
        """


class StaticDecoder(Decoder, Protocol):
    """A decoder whose rows all begin at once, and leave when they have ended.

    Each decoder has its own kind of cache, which belongs to one thread. All have `lengths`, int64 [batch]: the number
    of real tokens of each row, which is the position of its next one.
    """

    def prefill(self, rows: Sequence[Sequence[int]], factors: RowFactors, capacity: int) -> tuple[Logits, Any]:
        """Prefill whole prompts.  -> logits [batch, vocab] after each row's last token, and the cache

        capacity  tokens of a row that the cache must be able to hold
        """

    def step(self, token_ids: IntArray, factors: RowFactors, cache: Any) -> Logits:
        """Append one token to each row.  int64 [batch] -> logits [batch, vocab], valid until the next step

        The cache grows by the token.
        """

    def select(self, cache: Any, rows: IntArray) -> Any:
        """Select rows of the cache, in ascending order, when finished rows leave the batch. The old cache becomes
        invalid.
        """


def parts(
    lengths: IntArray, tokens: int, max_rows: int | None = None, alone: npt.NDArray[np.bool_] | None = None
) -> Iterator[slice]:
    """Yield slices of consecutive rows whose padded size is at most `tokens`; a longer row is alone.

    alone  bool [rows], those that are alone in any case
    """
    start = 0
    for stop in range(1, len(lengths) + 1):
        size = stop + 1 - start
        if (
            stop == len(lengths)
            or size * lengths[start : stop + 1].max() > tokens
            or (max_rows is not None and size > max_rows)
            or (alone is not None and alone[stop - 1 : stop + 1].any())
        ):
            yield slice(start, stop)
            start = stop


def pad(rows: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Return right-padded ids and their mask, int64 [batch, longest]. The pad id is never attended, so any id will
    do.
    """
    mask = np.zeros((len(rows), max(map(len, rows))), np.int64)
    input_ids = np.zeros_like(mask)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
    return input_ids, mask
