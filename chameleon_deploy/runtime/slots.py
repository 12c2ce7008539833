"""A batch whose rows join, prefill, step and leave independently, on one shared key-value buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chameleon_deploy.bundle import FloatArray
from chameleon_deploy.errors import LengthError
from chameleon_deploy.runtime.bound_call import BoundCall, Graph
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
        self.logits = np.empty((rows, model.vocab_size), np.float32)
        self._graph = graph
        self._steps: dict[int, BoundCall] = {}  # by number of rows

    def admit(self, row: int) -> None:
        """Begin a new, empty row."""
        self.lengths[row] = 0

    def prefill(self, row: int, token_ids: Sequence[int], factors: RowFactors, num_logits: int = 0) -> FloatArray:
        """Append tokens to a row.  -> logits float32 [num_logits, vocab], 0 or 1: after the last token

        factors  of this row
        """
        start, width = int(self.lengths[row]), len(token_ids)
        call = BoundCall(self._graph, 1, width, 1, num_logits, self._cache[:, row : row + 1])
        call.bind_factors(factors)
        call.input_ids[0] = token_ids
        call.position_ids[0] = np.arange(start, start + width)
        call.logits_positions[...] = width - 1
        call.seqlens_k[...] = start + width - 1
        call.total_sequence_length[...] = start + width
        logits = call.run()
        self.lengths[row] += width
        return np.asarray(logits[0])

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
