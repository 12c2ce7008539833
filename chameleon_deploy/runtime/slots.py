"""A batch whose rows join, prefill, step and leave independently, on one shared key-value buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import LengthError
from chameleon_deploy.runtime.bound_call import Array, BoundCall, Graph
from chameleon_deploy.runtime.decoder import pad
from chameleon_deploy.runtime.factors import RowFactors


class Slots:
    """The slots of a batch. Rows 0..n-1 are in use, counted by the caller; nothing is computed for the others. For one
    thread.

    capacity  tokens that a row can hold
    lengths   int64 [rows], tokens of each row in the cache
    is_exact  whether a step gives what reading its token gives, up to the order of sums; in int8 it rounds otherwise
    logits    float32 [rows, vocab], where `step` writes them
    """

    def __init__(self, graph: Graph, rows: int, capacity: int, dtype: Any) -> None:
        """Allocate the buffers.

        dtype  of the cache
        """
        model = graph.model
        self.capacity, self.is_exact = capacity, dtype == np.float32
        self.lengths = np.zeros(rows, np.int64)
        # Virtual memory becomes resident only where it is written.
        try:
            self._cache = np.empty((len(graph.past), rows, model.num_key_value_heads, capacity, model.head_dim), dtype)
        except (MemoryError, ValueError) as error:
            raise LengthError(f"no memory for a cache of {rows} rows of {capacity} tokens: pass less") from error
        self._memory = np.empty(0, dtype)
        self.logits = np.empty((rows, model.vocab_size), np.float32)
        self._graph = graph
        self._steps: dict[int, BoundCall] = {}  # by number of rows

    def admit(self, row: int) -> None:
        """Begin a new, empty row."""
        self.lengths[row] = 0

    def prefill(
        self, first: int, rows: Sequence[Sequence[int]], factors: RowFactors, num_logits: int = 0
    ) -> FloatArray:
        """Append tokens to the rows first, first + 1, ...  -> logits float32 [n, num_logits, vocab]

        Several rows must be empty: GroupQueryAttention appends several tokens to a non-empty cache for a single row
        only.

        factors     of these rows
        num_logits  0, or 1 for the logits after each row's last token
        """
        input_ids, mask = pad(rows)
        batch, width = input_ids.shape
        start, added = int(self.lengths[first]), mask.sum(1)
        place = self._cache[:, first : first + batch]
        # ONNX Runtime writes the whole rows of an empty cache, and its attention scores are as wide as they are.
        cache = place if start else self._fresh(batch, width)
        call = BoundCall(self._graph, batch, width, 1, num_logits, cache)
        call.bind_factors(factors)
        call.input_ids[:] = input_ids
        call.position_ids[:] = start + np.arange(width)
        call.logits_positions[:, 0] = added - 1
        call.seqlens_k[:] = start + added - 1
        call.total_sequence_length[...] = start + width
        logits = call.run()
        if not start:
            place[:, :, :, :width] = cache
        self.lengths[first : first + batch] += added
        return logits

    def _fresh(self, batch: int, width: int) -> Array:
        """Return a cache of `width` tokens per row, in memory that the next call reuses."""
        parts, _, heads, _, size = self._cache.shape
        shape = parts, batch, heads, width, size
        if self._memory.size < math.prod(shape):
            self._memory = np.empty(math.prod(shape), self._cache.dtype)
        return self._memory[: math.prod(shape)].reshape(shape)

    def step(self, token_ids: Sequence[int], factors: RowFactors) -> FloatArray:
        """Append one token to each of the rows 0..n-1.  [n] -> logits float32 [n, vocab], valid until the next step

        factors  of these rows
        """
        rows = len(token_ids)
        call = self._steps.get(rows)
        if call is None:
            call = self._steps[rows] = BoundCall(
                self._graph, rows, 1, 1, 1, self._cache[:, :rows], self.logits[:rows, None]
            )
        lengths = self.lengths[:rows]
        call.bind_factors(factors)
        call.input_ids[:, 0] = token_ids
        call.position_ids[:, 0] = lengths
        call.seqlens_k[:] = lengths
        call.total_sequence_length[...] = lengths.max() + 1
        logits = call.run()[:, 0]
        lengths += 1
        return logits

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to row `target`."""
        self.fork(source, target, int(self.lengths[source]))

    def fork(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        self._cache[:, target, :, :length] = self._cache[:, source, :, :length]
        self.lengths[target] = length
