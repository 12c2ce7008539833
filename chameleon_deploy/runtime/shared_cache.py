"""A decoder whose past and present are one buffer, written in place at each row's own length.

The inputs and outputs of a step are bound once per cache: a step fills in a few numbers and runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray, IntArray, Manifest
from chameleon_deploy.errors import LengthError
from chameleon_deploy.runtime.bound_call import Array, BoundCall
from chameleon_deploy.runtime.decoder import pad, parts
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.logits import HostLogits
from chameleon_deploy.runtime.schedule import chunk_length
from chameleon_deploy.runtime.slots import Slots
from chameleon_deploy.runtime.tiled_scorer import Piece, TiledScorer

PREFILL_TOKENS = 2048  # rows times width of one call; bounds activations at no cost
INT8_TOKENS = 256  # the same for int8, whose values then fit into the processor's cache
SCORED_TOKENS = 256  # the same if hidden states or logits of all positions are returned


class _Memory:
    """[at least size] of one dtype, from `spare` if one there is large enough; the last reference returns it.

    The first write to new memory costs time: 2 to 4 % of a prefill in int8.
    """

    def __init__(self, spare: list[Array], size: int, dtype: Any) -> None:
        self._spare = spare
        try:
            self.values = spare.pop()
        except IndexError:  # the first call, or other calls hold all of it
            self.values = np.empty(0, dtype)
        if self.values.size < size:
            self.values = np.empty(size, dtype)

    def __del__(self) -> None:
        self._spare[:] = [self.values]


@dataclass
class SharedCache:
    """The key-value cache of a batch.

    buffers  float32 or int8 [batch, heads, capacity, head_dim] of every layer's key and value, in the graph's order
    lengths  int64 [batch], real tokens per row
    memory   backs the buffers
    step     the bound arrays of a decoding step, created at the first step
    extend   the same of calls that append several tokens, by their number
    """

    buffers: list[Array]
    lengths: IntArray
    memory: _Memory
    step: BoundCall | None = None
    extend: dict[int, BoundCall] = field(default_factory=dict)


class SharedCacheDecoder:
    """The CPU's decoder. See `Decoder`."""

    def __init__(self, session: Any, scorer: TiledScorer, ort_value: Any, manifest: Manifest) -> None:
        self.session, self.scorer, self.ort_value, self.model = session, scorer, ort_value, manifest.model
        self.prefill_tokens = INT8_TOKENS if manifest.precision == "int8" else PREFILL_TOKENS
        self._spare_buffers: list[Array] = []
        past = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
        self.past = [node.name for node in past]
        self._buffer_dtype = np.int8 if past[0].type == "tensor(int8)" else np.float32

    def prefill(
        self, rows: Sequence[Sequence[int]], factors: RowFactors, capacity: int
    ) -> tuple[HostLogits, SharedCache]:
        lengths = np.array([len(ids) for ids in rows], np.int64)
        memory, buffers = self._buffers(len(rows), max(capacity, int(lengths.max())))
        cache = SharedCache(buffers, lengths, memory)
        logits = np.empty((len(rows), self.model.vocab_size), np.float32)
        for part in parts(lengths, self.prefill_tokens):
            # A slice of the batch axis is contiguous: each part fills its own range of the buffers.
            buffers = [buffer[part] for buffer in cache.buffers]
            own = factors.rows(np.arange(len(rows))[part])
            for start, piece in _pieces(rows[part], self.prefill_tokens):
                logits[part] = self._read(piece, own, buffers, start, last_only=True).run()[:, 0]
        return HostLogits(logits), cache

    def step(self, token_ids: IntArray, factors: RowFactors, cache: SharedCache) -> HostLogits:
        call = cache.step
        if call is None:
            call = cache.step = BoundCall(self, len(token_ids), 1, 1, 1, cache.buffers)
            call.bind_factors(factors)
        call.input_ids[:, 0] = token_ids
        call.position_ids[:, 0] = cache.lengths
        call.seqlens_k[:] = cache.lengths
        call.total_sequence_length[...] = cache.lengths.max() + 1
        cache.lengths = cache.lengths + 1
        return HostLogits(call.run()[:, 0])

    def extend(self, token_ids: Sequence[int], past: int, factors: RowFactors, cache: SharedCache) -> HostLogits:
        """Read tokens of a single row, of which the cache keeps the first `past` tokens.

        [n] -> logits [n, vocab], valid until the next call
        """
        width = len(token_ids)
        call = cache.extend.get(width)
        if call is None:
            call = cache.extend[width] = BoundCall(self, 1, width, width, width, cache.buffers)
            call.logits_positions[0] = np.arange(width)
            call.bind_factors(factors)
        call.input_ids[0] = token_ids
        call.position_ids[0] = np.arange(past, past + width)
        call.seqlens_k[0] = past + width - 1
        call.total_sequence_length[...] = past + width
        cache.lengths = np.array([past + width])
        return HostLogits(call.run()[0])

    def select(self, cache: SharedCache, rows: IntArray) -> SharedCache:
        used = int(cache.lengths.max())
        for buffer in cache.buffers:
            buffer[: len(rows), :, :used] = buffer[rows, :, :used]
        return SharedCache([buffer[: len(rows)] for buffer in cache.buffers], cache.lengths[rows], cache.memory)

    def slots(self, rows: int, capacity: int) -> Slots:
        """Return the state of a batch whose rows join and leave one by one, each of up to `capacity` tokens."""
        return Slots(self, rows, capacity, self._buffer_dtype)

    def all_logits(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[tuple[int, HostLogits]]:
        memory, buffers = self._buffers(len(rows), max(map(len, rows)))
        for start, piece in _pieces(rows, SCORED_TOKENS):
            yield start, HostLogits(self._read(piece, factors, buffers, start).run())
        del memory  # kept alive until here, since the calls write to it

    def token_logprobs(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> list[FloatArray]:
        return self.scorer.logprobs(rows, self.hidden_states([ids[:-1] for ids in rows], factors), factors)

    def hidden_states(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[Piece]:
        """Yield the hidden states of every position, a piece of a row at a time: row, first position, [n, hidden]."""
        lengths = np.array([len(ids) for ids in rows])
        for part in parts(lengths, SCORED_TOKENS):
            members, own = np.arange(len(rows))[part], factors.rows(np.arange(len(rows))[part])
            memory, buffers = self._buffers(len(members), int(lengths[part].max()))
            for start, piece in _pieces(rows[part], SCORED_TOKENS):
                call = self._read(piece, own, buffers, start, logits=False)
                call.run()
                for row, ids, states in zip(members.tolist(), piece, call.hidden_states, strict=True):
                    yield row, start, states[: len(ids)]
            del memory

    def _read(
        self,
        rows: Sequence[Sequence[int]],
        factors: RowFactors,
        buffers: list[Array],
        start: int,
        last_only: bool = False,
        logits: bool = True,
    ) -> BoundCall:
        """Run rows whose buffers hold `start` tokens already. Returns logits, or else hidden states, of each row's
        last position only, or of all.
        """
        input_ids, mask = pad(rows)
        batch, width = input_ids.shape
        lengths = mask.sum(1)
        positions = 1 if last_only else width
        call = BoundCall(self, batch, width, positions, positions if logits else 0, buffers)
        call.bind_factors(factors)
        call.input_ids[:] = input_ids
        call.position_ids[:] = start + np.arange(width)
        call.logits_positions[:] = lengths[:, None] - 1 if last_only else np.arange(width)
        call.seqlens_k[:] = start + lengths - 1
        call.total_sequence_length[...] = start + width
        return call

    def _buffers(self, batch: int, capacity: int) -> tuple[_Memory, list[Array]]:
        shape = (len(self.past), batch, self.model.num_key_value_heads, capacity, self.model.head_dim)
        try:
            memory = _Memory(self._spare_buffers, math.prod(shape), self._buffer_dtype)
        except (MemoryError, ValueError) as error:  # numpy's answer to a size beyond the address space
            raise LengthError(
                f"no memory for a cache of {batch} rows of {capacity} tokens: "
                "pass fewer rows or a smaller max_new_tokens"
            ) from error
        return memory, list(memory.values[: math.prod(shape)].reshape(shape))


def _pieces(rows: Sequence[Sequence[int]], tokens: int) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    """Split a single row into pieces of at most `tokens`, with the position of the first; several rows stay whole.

    GroupQueryAttention appends several tokens to a non-empty cache for a single row only.
    """
    if len(rows) > 1:
        yield 0, rows
        return
    start, length = 0, len(rows[0])
    while start < length:
        stop = start + chunk_length(length - start, tokens)
        yield start, [rows[0][start:stop]]
        start = stop
