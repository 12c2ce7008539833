"""A decoder whose past and present are one buffer, written in place at each row's own length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import INTEGERS, FloatArray, Manifest
from chameleon_deploy.runtime.decode.bound_call import Array, BoundCall
from chameleon_deploy.runtime.decode.decoder import pad, parts
from chameleon_deploy.runtime.decode.logits import HostLogits
from chameleon_deploy.runtime.decode.prefix_cache import PrefixCache
from chameleon_deploy.runtime.decode.schedule import chunk_length
from chameleon_deploy.runtime.decode.slots import KeyValues, Slots
from chameleon_deploy.runtime.decode.tiled_scorer import Piece, TiledScorer
from chameleon_deploy.runtime.factors import RowFactors

# Rows times width of one call that reads prompts. Larger calls read the weights less often, but their attention scores,
# this times the row's capacity in each head, leave the processor's cache, and have to be held.
PREFILL_TOKENS = 512
INT8_TOKENS = 256  # the same for int8 and int4, whose activations then fit into the processor's cache
SCORED_TOKENS = 256  # the same if hidden states or logits of all positions are returned


class SharedCacheDecoder:
    """The CPU's decoder, which scores whole texts and makes slots for the rest. See `Decoder`.

    prefill_tokens  of the largest call that pays
    is_exact        whether a call of several tokens gives what as many of one token give, up to the order of sums
    """

    def __init__(self, session: Any, scorer: TiledScorer, ort_value: Any, manifest: Manifest) -> None:
        self.session, self.scorer, self.ort_value, self.model = session, scorer, ort_value, manifest.model
        self.prefill_tokens = INT8_TOKENS if manifest.precision in INTEGERS else PREFILL_TOKENS
        self._spare: list[Array] = []
        past = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
        self.past = [node.name for node in past]
        self.is_exact = past[0].type != "tensor(int8)"
        self._dtype = np.float32 if self.is_exact else np.int8

    @property
    def token_bytes(self) -> int:
        """Return the bytes of the keys and values of one token of a row."""
        return len(self.past) * self.model.num_key_value_heads * self.model.head_dim * np.dtype(self._dtype).itemsize

    def prefix_cache(self, bundle_digest: str, max_bytes: int) -> PrefixCache:
        """Return an empty cache of blocks of these keys and values."""
        shape = len(self.past), self.model.num_key_value_heads, self.model.head_dim
        return PrefixCache(bundle_digest, shape, self._dtype, max_bytes)

    def slots(self, rows: int, capacity: int) -> Slots:
        """Return the state of a batch whose rows join and leave one by one, each of up to `capacity` tokens."""
        return Slots(self, rows, capacity, self._key_values)

    def all_logits(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[tuple[int, HostLogits]]:
        if len(rows) > 1 and factors.later():  # each row is read in its own parts
            logits = np.zeros((len(rows), max(map(len, rows)), self.model.vocab_size), np.float32)
            for row, ids in enumerate(rows):
                for start, part in self.all_logits([ids], factors.rows(np.array([row]))):
                    logits[row, start : start + part.shape[1]] = np.asarray(part)[0]
            yield 0, HostLogits(logits)
            return
        cache = self._key_values(len(rows), max(map(len, rows)))
        for start, piece in _pieces(rows, SCORED_TOKENS, factors.later()):
            own = factors.at(np.arange(len(rows)), start)
            yield start, HostLogits(self._read(piece, own, cache.values, start).run())

    def token_logprobs(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> list[FloatArray]:
        return self.scorer.logprobs(rows, self.hidden_states([ids[:-1] for ids in rows], factors), factors)

    def hidden_states(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[Piece]:
        """Yield the hidden states of every position, a piece of a row at a time: row, first position, [n, hidden]."""
        lengths = np.array([len(ids) for ids in rows])
        later = factors.starts if factors.starts is not None else np.zeros(len(rows), np.int64)
        for part in parts(lengths, SCORED_TOKENS, alone=later > 0):
            members, own = np.arange(len(rows))[part], factors.rows(np.arange(len(rows))[part])
            cache = self._key_values(len(members), int(lengths[part].max()))
            for start, piece in _pieces(rows[part], SCORED_TOKENS, own.later()):
                read_with = own.at(np.arange(len(members)), start)
                call = self._read(piece, read_with, cache.values, start, logits=False)
                call.run()
                for row, ids, states in zip(members.tolist(), piece, call.hidden_states, strict=True):
                    yield row, start, states[: len(ids)]
            del cache  # whose memory the next part takes

    def _read(
        self, rows: Sequence[Sequence[int]], factors: RowFactors, cache: Array, start: int, logits: bool = True
    ) -> BoundCall:
        """Make the call that reads rows whose cache holds `start` tokens already: logits of all positions, or else
        hidden states.
        """
        input_ids, mask = pad(rows)
        batch, width = input_ids.shape
        call = BoundCall(self, batch, width, width, width if logits else 0, cache)
        call.bind_factors(factors)
        call.input_ids[:] = input_ids
        call.position_ids[:] = start + np.arange(width)
        call.logits_positions[:] = np.arange(width)
        call.seqlens_k[:] = start + mask.sum(1) - 1
        call.total_sequence_length[...] = start + width
        return call

    def _key_values(self, rows: int, capacity: int) -> KeyValues:
        shape = (len(self.past), rows, self.model.num_key_value_heads, capacity, self.model.head_dim)
        return KeyValues(self._spare, shape, self._dtype)


def _pieces(
    rows: Sequence[Sequence[int]], tokens: int, cuts: Sequence[int]
) -> Iterator[tuple[int, Sequence[Sequence[int]]]]:
    """Split a single row into pieces of at most `tokens`, with the position of the first; several rows stay whole.

    GroupQueryAttention appends several tokens to a non-empty cache for a single row only.

    cuts  where a piece of a single row ends in any case
    """
    if len(rows) > 1:
        yield 0, rows
        return
    start, length = 0, len(rows[0])
    while start < length:
        end = next((cut for cut in cuts if start < cut < length), length)
        stop = start + chunk_length(end - start, tokens)
        yield start, [rows[0][start:stop]]
        start = stop
