"""A batch whose rows join, prefill, step and leave independently, on one shared key-value buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import LengthError
from chameleon_deploy.runtime.decode.bound_call import Array, BoundCall, Graph
from chameleon_deploy.runtime.decode.decoder import pad
from chameleon_deploy.runtime.factors import RowFactors

MOSTLY_FILLED = 2  # times its prompt that a row may hold for the prompt to be written in place


class KeyValues:
    """The keys and values of some rows, [layers * 2, rows, heads, capacity, head_dim], float32 or int8.

    Their memory comes from `spare` if any there is large enough; the last reference returns it. The first write to new
    memory costs time: 2 to 4 % of a prefill in int8.
    """

    def __init__(self, spare: list[Array], shape: tuple[int, ...], dtype: Any) -> None:
        """Raises LengthError if there is not enough memory."""
        size = math.prod(shape)
        self._spare = spare
        try:
            self._memory = spare.pop()
        except IndexError:  # the first call, or other calls hold all of it
            self._memory = np.empty(0, dtype)
        if self._memory.size < size:
            try:
                self._memory = np.empty(size, dtype)  # virtual memory becomes resident only where it is written
            except (MemoryError, ValueError) as error:  # numpy's answer to a size beyond the address space
                raise LengthError(
                    f"no memory for a cache of {shape[1]} rows of {shape[3]} tokens: "
                    "pass fewer rows or a smaller max_new_tokens"
                ) from error
        self.values = self._memory[:size].reshape(shape)

    def __del__(self) -> None:
        self._spare[:] = [self._memory]


class Slots:
    """The slots of a batch. Rows 0..n-1 are in use, counted by the caller; nothing is computed for the others. For one
    thread.

    capacity  tokens that a row can hold
    lengths   int64 [rows], tokens of each row in the cache
    is_exact  whether a step gives what reading its token gives, up to the order of sums; in int8 it rounds otherwise
    logits    float32 [rows, vocab], where `step` writes them
    """

    def __init__(self, graph: Graph, rows: int, capacity: int, allocate: Callable[[int, int], KeyValues]) -> None:
        """Take the memory of the cache.

        allocate  returns the cache of so many rows of so many tokens

        Raises LengthError if there is not enough memory.
        """
        self._graph, self._allocate = graph, allocate
        self._memory = allocate(rows, capacity)
        self._cache = self._memory.values
        self.capacity, self.is_exact = capacity, self._cache.dtype == np.float32
        self.lengths = np.zeros(rows, np.int64)
        self.logits = np.empty((rows, graph.model.vocab_size), np.float32)
        self._steps: dict[int, BoundCall] = {}  # by number of rows
        self._drafts: dict[tuple[int, int], BoundCall] = {}  # by row and number of tokens

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
        # ONNX Runtime writes the whole rows of an empty cache, and its attention scores are as wide as they are: in
        # rows that are mostly longer, a copy costs less.
        fresh = None if start or self.capacity <= MOSTLY_FILLED * width else self._allocate(batch, width)
        cache = place if fresh is None else fresh.values
        call = BoundCall(self._graph, batch, width, 1, num_logits, cache)
        call.bind_factors(factors)
        call.input_ids[:] = input_ids
        call.position_ids[:] = start + np.arange(width)
        call.logits_positions[:, 0] = added - 1
        call.seqlens_k[:] = start + added - 1
        call.total_sequence_length[...] = start + width
        logits = call.run()
        if fresh is not None:
            place[:, :, :, :width] = cache
        self.lengths[first : first + batch] += added
        return logits

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

    def draft(self, row: int, token_ids: Sequence[int], factors: RowFactors) -> FloatArray:
        """Append several tokens to a row, of which some may be cut off again.

        [n] -> logits float32 [n, vocab] after each, valid until the next draft

        factors  of this row
        """
        width, past = len(token_ids), int(self.lengths[row])
        call = self._drafts.get((row, width))
        if call is None:
            call = BoundCall(self._graph, 1, width, width, width, self._cache[:, row : row + 1])
            call.logits_positions[0] = np.arange(width)
            self._drafts[row, width] = call
        call.bind_factors(factors)
        call.input_ids[0] = token_ids
        call.position_ids[0] = np.arange(past, past + width)
        call.seqlens_k[0] = past + width - 1
        call.total_sequence_length[...] = past + width
        logits: FloatArray = call.run()[0]
        self.lengths[row] += width
        return logits

    def cut(self, row: int, length: int) -> None:
        """Forget the tokens of a row after the first `length`."""
        self.lengths[row] = length

    def copy_out(self, row: int, start: int, block: Array) -> None:
        """Copy the keys and values of a row from token `start` on.  -> block [layers * 2, heads, tokens, head_dim]"""
        block[...] = self._cache[:, row, :, start : start + block.shape[2]]

    def copy_in(self, row: int, block: Array) -> None:
        """Append the keys and values of tokens to a row, [layers * 2, heads, tokens, head_dim]."""
        start, stop = int(self.lengths[row]), int(self.lengths[row]) + block.shape[2]
        self._cache[:, row, :, start:stop] = block
        self.lengths[row] = stop

    def move(self, source: int, target: int) -> None:
        """Copy row `source` to row `target`."""
        self.fork(source, target, int(self.lengths[source]))

    def swap(self, row: int, other: int) -> None:
        """Exchange two rows."""
        lengths = int(self.lengths[row]), int(self.lengths[other])
        kept = self._cache[:, row, :, : lengths[0]].copy()
        self.move(other, row)
        self._cache[:, other, :, : lengths[0]] = kept
        self.lengths[other] = lengths[0]

    def fork(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        self._cache[:, target, :, :length] = self._cache[:, source, :, :length]
        self.lengths[target] = length
