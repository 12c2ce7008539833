"""What a decoder does, whichever way its graph keeps the key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from chameleon_deploy.bundle import FloatArray, GraphSpec, ModelSpec
from chameleon_deploy.runtime.adaptation import Adaptation, IntArray


class Cache(Protocol):
    """Keys and values of a batch; each decoder has its own kind.

    lengths  int64 [batch], real tokens per row: the next token's position
    """

    lengths: IntArray


class Decoder(Protocol):
    """One session serves prefill, decoding and scoring. Safe to call from many threads, one cache in one thread."""

    def prefill(self, rows: Sequence[Sequence[int]], adaptation: Adaptation, capacity: int) -> tuple[FloatArray, Any]:
        """Read whole prompts.  -> logits [batch, vocab] after each row's last token, and the cache

        capacity  how many tokens of a row the cache must be able to hold in the end
        """

    def step(self, token_ids: IntArray, adaptation: Adaptation, cache: Any) -> FloatArray:
        """One more token per row.  int64 [batch] -> logits [batch, vocab], valid until the next step

        The cache grows by the token.
        """

    def keep(self, cache: Any, rows: IntArray) -> Any:
        """The cache of some rows only, in ascending order: finished rows leave the batch. The old cache is used up."""

    def all_logits(self, rows: Sequence[Sequence[int]], adaptation: Adaptation) -> Iterator[tuple[int, FloatArray]]:
        """Logits of every position, piece by piece: (first position, float32 [batch, positions, vocab])."""


def make_decoder(session: Any, ort_value: Any, graph: GraphSpec, model: ModelSpec) -> Decoder:
    """The decoder for a graph's kind of cache, over an open session of it."""
    from chameleon_deploy.runtime.growing_cache import GrowingCacheDecoder
    from chameleon_deploy.runtime.shared_cache import SharedCacheDecoder

    kind = SharedCacheDecoder if graph.cache == "shared" else GrowingCacheDecoder
    return kind(session, ort_value, model)


def pad(rows: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Right-padded ids and their mask, int64 [batch, longest]. The pad id is never attended, any id will do."""
    mask = np.zeros((len(rows), max(map(len, rows))), np.int64)
    input_ids = np.zeros_like(mask)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
    return input_ids, mask
