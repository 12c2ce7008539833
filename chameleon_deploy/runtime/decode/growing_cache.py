"""A decoder whose graph concatenates past and present: the portable graph, which every provider runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray, IntArray, ModelSpec
from chameleon_deploy.runtime.decode.decoder import pad
from chameleon_deploy.runtime.decode.logits import HostLogits
from chameleon_deploy.runtime.decode.logits_scorer import logprobs_of_logits
from chameleon_deploy.runtime.decode.session import run
from chameleon_deploy.runtime.factors import RowFactors

PIECE_BYTES = 256 * 2**20  # bound on the largest tensor of one call: attention scores, or logits when scoring


@dataclass
class GrowingCache:
    """The key-value cache of a batch.

    tensors  OrtValues float32 [batch, heads, past, head_dim], in the order of the graph's inputs
    mask     int64 [batch, past], 1 if the slot holds a real token
    lengths  int64 [batch], real tokens per row: the next token's position
    """

    tensors: list[Any]
    mask: IntArray
    lengths: IntArray


class GrowingCacheDecoder:
    """The decoder on the portable graph. See `Decoder`."""

    def __init__(self, session: Any, ort_value: Any, model: ModelSpec, threads: int) -> None:
        """Take a session.

        threads  number of threads that compute the softmax of scored logits
        """
        self.session, self._ort_value, self._model, self._threads = session, ort_value, model, threads
        self._past = [node.name for node in session.get_inputs() if node.name.startswith("past_key_values.")]
        self._present = [name.replace("past_key_values", "present") for name in self._past]

    def prefill(
        self, rows: Sequence[Sequence[int]], factors: RowFactors, capacity: int
    ) -> tuple[HostLogits, GrowingCache]:
        input_ids, mask = pad(rows)
        last = mask.sum(1) - 1
        logits = np.empty((len(rows), self._model.vocab_size), np.float32)
        cache = self._empty_cache(len(rows))
        for start, stop in self._pieces(input_ids.shape, factors.later()):
            own = factors.at(np.arange(len(rows)), start)
            position = np.clip(last - start, 0, stop - start - 1)[:, None]
            piece = self._run(input_ids[:, start:stop], mask[:, start:stop], position, own, cache)
            ends_here = (start <= last) & (last < stop)
            logits[ends_here] = piece[ends_here, 0]
        return HostLogits(logits), cache

    def step(self, token_ids: IntArray, factors: RowFactors, cache: GrowingCache) -> HostLogits:
        ones, zeros = np.ones((len(token_ids), 1), np.int64), np.zeros((len(token_ids), 1), np.int64)
        return HostLogits(self._run(token_ids[:, None], ones, zeros, factors, cache)[:, 0])

    def all_logits(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[tuple[int, HostLogits]]:
        input_ids, mask = pad(rows)
        cache = self._empty_cache(len(rows))
        for start, stop in self._pieces(input_ids.shape, factors.later(), all_logits=True):
            own = factors.at(np.arange(len(rows)), start)
            positions = np.tile(np.arange(stop - start), (len(rows), 1))
            logits = self._run(input_ids[:, start:stop], mask[:, start:stop], positions, own, cache)
            yield start, HostLogits(logits, self._threads)

    def token_logprobs(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> list[FloatArray]:
        return logprobs_of_logits(self, rows, factors)

    def select(self, cache: GrowingCache, rows: IntArray) -> GrowingCache:
        tensors = [self._ort_value.ortvalue_from_numpy(value.numpy()[rows]) for value in cache.tensors]
        return GrowingCache(tensors, cache.mask[rows], cache.lengths[rows])

    def _run(
        self,
        input_ids: IntArray,
        mask: IntArray,
        logits_positions: IntArray,
        factors: RowFactors,
        cache: GrowingCache,
    ) -> FloatArray:
        """Run input_ids and mask int64 [batch, sequence] and append them to the cache.  -> logits [batch, positions,
        vocab]
        """
        real = mask.cumsum(1)
        attention_mask = np.concatenate([cache.mask, mask], axis=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": cache.lengths[:, None] + np.maximum(real - 1, 0),
            "logits_positions": logits_positions,
            "factor_ids": factors.factor_ids,
            **factors.sets.tensors,
        }
        values = {name: self._ort_value.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}
        values |= zip(self._past, cache.tensors, strict=True)
        # OrtValues stay inside ONNX Runtime: the cache is never copied to numpy and back.
        logits, *cache.tensors = run(self.session.run_with_ort_values, ["logits", *self._present], values)
        cache.mask, cache.lengths = attention_mask, cache.lengths + real[:, -1]
        return np.asarray(logits.numpy())

    def _empty_cache(self, batch: int) -> GrowingCache:
        shape = (batch, self._model.num_key_value_heads, 0, self._model.head_dim)
        empty = self._ort_value.ortvalue_from_numpy(np.empty(shape, np.float32))
        return GrowingCache([empty] * len(self._past), np.empty((batch, 0), np.int64), np.zeros(batch, np.int64))

    def _pieces(
        self, shape: tuple[int, ...], cuts: Sequence[int], all_logits: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Yield column ranges whose largest tensor is at most PIECE_BYTES, cut in these columns too."""
        batch, width = shape
        per_column = batch * 4 * max(self._model.num_attention_heads * width, self._model.vocab_size * all_logits)
        step = max(1, PIECE_BYTES // per_column)
        for first, last in pairwise([0, *(cut for cut in cuts if cut < width), width]):
            for start in range(first, last, step):
                yield start, min(start + step, last)
