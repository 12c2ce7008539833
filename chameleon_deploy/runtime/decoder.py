"""What a decoder does, whichever way its graph keeps the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from chameleon_deploy.bundle import FloatArray, IntArray
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.logits import Logits


class Decoder(Protocol):
    """One session serves prefill, decoding and scoring. Safe to call from many threads, one cache in one thread.

    Each decoder has its own kind of cache; all have `lengths`, int64 [batch]: the real tokens of each row, which is the
    position of its next one. Factors are where the backend placed them (`Backend.place`), one entry of `factor_ids` for
    each row.
    """

    def prefill(self, rows: Sequence[Sequence[int]], factors: RowFactors, capacity: int) -> tuple[Logits, Any]:
        """Read whole prompts.  -> logits [batch, vocab] after each row's last token, and the cache

        capacity  how many tokens of a row the cache must be able to hold in the end
        """

    def step(self, token_ids: IntArray, factors: RowFactors, cache: Any) -> Logits:
        """One more token per row.  int64 [batch] -> logits [batch, vocab], valid until the next step

        The cache grows by the token.
        """

    def keep(self, cache: Any, rows: IntArray) -> Any:
        """The cache of some rows only, in ascending order: finished rows leave the batch. The old cache is used up."""

    def all_logits(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[tuple[int, Logits]]:
        """Logits of every position, piece by piece: (first position, float32 [batch, positions, vocab])."""

    def token_logprobs(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> list[FloatArray]:
        """Of every row the log-probability of each token after the first, float32 [length - 1].

        rows  of at least two tokens. Those of similar length are best beside each other, where they share a call
        """


def parts(lengths: IntArray, tokens: int, max_rows: int | None = None) -> Iterator[slice]:
    """Consecutive rows whose padded size stays within so many tokens; a longer row goes alone."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        size = stop + 1 - start
        if (
            stop == len(lengths)
            or size * lengths[start : stop + 1].max() > tokens
            or (max_rows is not None and size > max_rows)
        ):
            yield slice(start, stop)
            start = stop


def pad(rows: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Right-padded ids and their mask, int64 [batch, longest]. The pad id is never attended, any id will do."""
    mask = np.zeros((len(rows), max(map(len, rows))), np.int64)
    input_ids = np.zeros_like(mask)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
    return input_ids, mask
