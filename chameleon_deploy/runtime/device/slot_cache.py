"""A decoder whose factors, key-value cache and logits stay on the device, and whose steps have constant shapes.

It drives the portable graph, which reads the cache as `past` and writes past and present as one tensor. Each row's
cache has a fixed number of slots; the attention mask selects the slots that hold a token. A step reads all slots and
writes them, followed by the new token, into a second buffer. Then only the new token is copied into the first free
slot. Shapes and addresses therefore change only when the slots are used up or rows leave, so that an engine can bind a
step once and replay it.

All layers are in one buffer, [layers * 2, rows, slots, head_dim], so that each of these moves is one strided copy: the
new token of all layers, the cache into longer slots, one row onto another. The rows of a batch fill the same slot in a
step. Prompts of different length therefore leave gaps, which are closed when no more slots can be allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray, IntArray, LimitsSpec, ModelSpec
from chameleon_deploy.errors import InputError, LengthError, NumericError
from chameleon_deploy.runtime.decode.decoder import pad
from chameleon_deploy.runtime.decode.logits_scorer import logprobs_of_logits
from chameleon_deploy.runtime.device.cuda import ITEM_SIZES, CudaDevice, DeviceArray
from chameleon_deploy.runtime.device.graph import Bound, DeviceGraph
from chameleon_deploy.runtime.factors import FactorSets, RowFactors

SLOTS = 128  # the cache grows by this many slots
LOGITS_BYTES = 2**30  # of one piece of `all_logits`
ALIGNMENT = 256  # bytes: TensorRT's requirement for addresses


class DeviceLogits:
    """Logits on a device. See `Logits`. numpy.asarray copies all of them to the host."""

    def __init__(self, values: DeviceArray, chooser: DeviceGraph, scorer: DeviceGraph) -> None:
        self._values, self._chooser, self._scorer = values, chooser, scorer
        batch, *positions, vocab = values.shape
        self._stacked = values.view((batch, *(positions or [1]), vocab))
        self._token_ids: DeviceArray | None = None
        self._choose: Bound | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    def greedy(self) -> IntArray:
        device = self._values.device
        with device.lock:
            # bound once, since a step's logits always have one address
            if self._choose is None or self._token_ids is None:
                self._token_ids = device.empty(self._stacked.shape[:-1], "int64")
                self._choose = self._chooser.bind({"logits": self._stacked, "token_ids": self._token_ids})
            self._choose.run()
            token_ids: IntArray = device.read(self._token_ids)
        if token_ids.min() < 0:
            raise NumericError("the decoder produced logits that are not finite: check the factors")
        return token_ids.reshape(self._values.shape[:-1])

    def logprobs(self, targets: Sequence[IntArray]) -> Iterator[FloatArray]:
        padded = np.zeros(self._stacked.shape[:-1], np.int64)
        for i, ids in enumerate(targets):
            padded[i, : len(ids)] = ids
        device = self._values.device
        with device.lock:
            logprobs = device.empty(padded.shape, "float32")
            tensors = {"logits": self._stacked, "targets": device.upload(padded, "int64"), "logprobs": logprobs}
            self._scorer.bind(tensors).run()
            values = device.read(logprobs)
        yield from (row[: len(ids)] for row, ids in zip(values, targets, strict=True))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self._values, dtype)


@dataclass
class SlotCache:
    """The key-value cache of a batch.

    past      [layers * 2, rows, slots, head_dim]; `rows` is batch * heads, rounded up until layers are aligned
    mask      int64 [batch, slots + 1], 1 if a slot holds a token, and for the new token after them
    width     slots in use, the same for every row; slots in a row's gap are masked
    start     the slot after the longest row when the rows last had no gaps
    packed    int64 [batch], tokens of each row before its gap
    lengths   int64 [batch], real tokens per row: the next token's position
    capacity  tokens that a row may hold in the end
    longest   slots that can be used in the end
    step      a bound decoding step, created at the first step
    """

    past: DeviceArray
    mask: DeviceArray
    width: int
    start: int
    packed: IntArray
    lengths: IntArray
    capacity: int
    longest: int
    step: _Step | None = None

    @property
    def slots(self) -> int:
        return self.past.shape[2]


@dataclass
class _Step:
    """A bound decoding step.

    numbers  int64 [2, padded batch], the token ids and their positions, which is all that a step uploads
    """

    numbers: DeviceArray
    present: DeviceArray
    logits: DeviceLogits
    decoder: Bound


class SlotCacheDecoder:
    """A decoder on a device. See `Decoder`. Its logits are DeviceLogits."""

    def __init__(
        self,
        device: CudaDevice,
        decoder: DeviceGraph,
        chooser: DeviceGraph,
        scorer: DeviceGraph,
        model: ModelSpec,
        limits: LimitsSpec | None,
    ) -> None:
        """Take the graphs of a device.

        limits  of engines with fixed profiles; None if any shape runs
        """
        self.device = device
        self._decoder, self._chooser, self._scorer = decoder, chooser, scorer
        self._model, self._limits = model, limits
        self._past = [spec.name for spec in decoder.spec.inputs if spec.name.startswith("past_key_values.")]
        self._cache_dtype = next(spec.dtype for spec in decoder.spec.inputs if spec.name == self._past[0])
        self._slot_bytes = model.head_dim * ITEM_SIZES[self._cache_dtype]

    def prefill(
        self, rows: Sequence[Sequence[int]], factors: RowFactors, capacity: int
    ) -> tuple[DeviceLogits, SlotCache]:
        input_ids, mask = pad(rows)
        (batch, width), lengths = mask.shape, mask.sum(1)
        capacity = max(capacity, width)
        self._check_limits(batch, width, capacity, len(factors.sets))
        with self.device.lock:
            present = self._buffer(self._rows(batch), width)
            logits = self._read(input_ids, mask, lengths[:, None] - 1, factors, present)
            longest = width + capacity - int(lengths.min())
            slots = self._slots(width, longest)
            past = self._zeros(present.shape[1], slots)
            self._copy_slots(past, 0, present, 0, min(width, slots))
            opened = self.device.upload(_mask(lengths, width, width, slots), "int64")
            cache = SlotCache(past, opened, width, width, lengths, lengths, capacity, longest)
            flat = logits.view((batch, self._model.vocab_size))
            return DeviceLogits(flat, self._chooser, self._scorer), cache

    def step(self, token_ids: IntArray, factors: RowFactors, cache: SlotCache) -> DeviceLogits:
        if cache.lengths.max() >= cache.capacity:
            raise LengthError(f"the cache was made for {cache.capacity} tokens per row and is full")
        with self.device.lock:
            if cache.width == cache.slots:
                self._make_room(cache)
            step = cache.step = cache.step or self._make_step(cache, factors)
            numbers = np.zeros(step.numbers.shape, np.int64)
            numbers[:, : len(token_ids)] = token_ids, cache.lengths
            self.device.write(step.numbers, numbers)
            step.decoder.run()
            if cache.width < cache.slots:  # the last token that the capacity allows is never read again
                self._copy_slots(cache.past, cache.width, step.present, cache.slots, 1)
                self._open_slot(cache)
        cache.width, cache.lengths = cache.width + 1, cache.lengths + 1
        return step.logits

    def select(self, cache: SlotCache, rows: IntArray) -> SlotCache:
        layers, padded_rows, slots, _ = cache.past.shape
        row = self._model.num_key_value_heads * slots * self._slot_bytes
        layer, mask_row = padded_rows * slots * self._slot_bytes, (slots + 1) * ITEM_SIZES["int64"]
        with self.device.lock:
            for to, at in enumerate(rows.tolist()):  # ascending, so that no row is overwritten before it has moved
                if to != at:
                    address = cache.past.address
                    self.device.copy(address + to * row, layer, address + at * row, layer, row, layers)
                    address = cache.mask.address
                    self.device.copy(address + to * mask_row, mask_row, address + at * mask_row, mask_row, mask_row, 1)
        mask = cache.mask.view((len(rows), slots + 1))
        return replace(cache, mask=mask, packed=cache.packed[rows], lengths=cache.lengths[rows], step=None)

    def all_logits(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> Iterator[tuple[int, DeviceLogits]]:
        input_ids, mask = pad(rows)
        batch, width = mask.shape
        self._check_limits(batch, width, width, len(factors.sets))
        step = max(1, LOGITS_BYTES // (batch * self._model.vocab_size * ITEM_SIZES["float32"]))
        for start in range(0, width, step):
            positions = np.tile(np.arange(start, min(start + step, width)), (batch, 1))
            with self.device.lock:
                present = self._buffer(self._rows(batch), width)
                logits = self._read(input_ids, mask, positions, factors, present)
            yield start, DeviceLogits(logits, self._chooser, self._scorer)

    def token_logprobs(self, rows: Sequence[Sequence[int]], factors: RowFactors) -> list[FloatArray]:
        return logprobs_of_logits(self, rows, factors, max_rows=self._limits.batch if self._limits else None)

    def _read(
        self,
        input_ids: IntArray,
        mask: IntArray,
        logits_positions: IntArray,
        factors: RowFactors,
        present: DeviceArray,
    ) -> DeviceArray:
        """Prefill whole rows into an empty cache.  -> logits [batch, positions, vocab]"""
        logits = self.device.empty((*logits_positions.shape, self._model.vocab_size), "float32")
        numbers = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
            "logits_positions": logits_positions,
            "factor_ids": factors.factor_ids,
        }
        tensors = {name: self.device.upload(values, "int64") for name, values in numbers.items()}
        nothing = self._buffer(present.shape[1], 0)
        tensors |= {**_placed(factors.sets), "logits": logits}
        self._decoder.bind(tensors | self._cache_tensors(nothing, present, len(input_ids))).run()
        return logits

    def _make_step(self, cache: SlotCache, factors: RowFactors) -> _Step:
        batch = len(cache.lengths)
        padded = _round_up(batch, ALIGNMENT // ITEM_SIZES["int64"])
        numbers = self.device.empty((2, padded), "int64")
        present = self._buffer(cache.past.shape[1], cache.slots + 1)
        logits = self.device.empty((batch, self._model.vocab_size), "float32")
        tensors = {
            "input_ids": numbers.view((batch, 1)),
            "position_ids": numbers.view((batch, 1), padded * ITEM_SIZES["int64"]),
            "attention_mask": cache.mask,
            "logits_positions": self.device.zeros((batch, 1), "int64"),
            "factor_ids": self.device.upload(factors.factor_ids, "int64"),
            **_placed(factors.sets),
            "logits": logits.view((batch, 1, self._model.vocab_size)),
        }
        decoder = self._decoder.bind(tensors | self._cache_tensors(cache.past, present, batch))
        return _Step(numbers, present, DeviceLogits(logits, self._chooser, self._scorer), decoder)

    def _make_room(self, cache: SlotCache) -> None:
        """Allocate more slots; if the engine allows no more, close the gaps of the rows."""
        slots, used = self._slots(cache.width, cache.longest), int(cache.lengths.max())
        if slots > cache.slots:
            past = self._zeros(cache.past.shape[1], slots)
            self._copy_slots(past, 0, cache.past, 0, cache.slots)
            opened = _mask(cache.packed, cache.start, cache.width, slots)
            cache.past, cache.mask, cache.step = past, self.device.upload(opened, "int64"), None
        elif used < cache.width:
            past = self._zeros(cache.past.shape[1], slots)
            self._copy_slots(past, 0, cache.past, 0, cache.start)
            heads, pitch = self._model.num_key_value_heads, slots * self._slot_bytes
            recent = (cache.width - cache.start) * self._slot_bytes
            for row, end in enumerate(cache.packed.tolist()):
                for layer in range(len(self._past)):
                    offset = (layer * cache.past.shape[1] + row * heads) * pitch
                    to, at = offset + end * self._slot_bytes, offset + cache.start * self._slot_bytes
                    self.device.copy(past.address + to, pitch, cache.past.address + at, pitch, recent, heads)
            opened = _mask(cache.lengths, used, used, slots)
            cache.past, cache.mask, cache.step = past, self.device.upload(opened, "int64"), None
            cache.packed, cache.width, cache.start = cache.lengths, used, used

    def _open_slot(self, cache: SlotCache) -> None:
        """Set the mask of the slot that was just filled, from the column that is always set."""
        item, address = ITEM_SIZES["int64"], cache.mask.address
        pitch = (cache.slots + 1) * item
        self.device.copy(address + cache.width * item, pitch, address + cache.slots * item, pitch, item,
                         len(cache.lengths))  # fmt: skip

    def _copy_slots(self, target: DeviceArray, to: int, source: DeviceArray, at: int, count: int) -> None:
        """Copy `count` slots of every row and layer from slot `at` of one buffer to slot `to` of another."""
        layers, rows, *_ = target.shape
        self.device.copy(
            target.address + to * self._slot_bytes, target.shape[2] * self._slot_bytes,
            source.address + at * self._slot_bytes, source.shape[2] * self._slot_bytes,
            count * self._slot_bytes, layers * rows,
        )  # fmt: skip

    def _cache_tensors(self, past: DeviceArray, present: DeviceArray, batch: int) -> dict[str, DeviceArray]:
        tensors = {}
        for buffer, prefix in ((past, "past_key_values"), (present, "present")):
            _, rows, slots, head_dim = buffer.shape
            for i, name in enumerate(self._past):
                shape = (batch, self._model.num_key_value_heads, slots, head_dim)
                tensors[name.replace("past_key_values", prefix)] = buffer.view(
                    shape, i * rows * slots * self._slot_bytes
                )
        return tensors

    def _rows(self, batch: int) -> int:
        return _round_up(batch * self._model.num_key_value_heads, ALIGNMENT // math.gcd(ALIGNMENT, self._slot_bytes))

    def _buffer(self, rows: int, slots: int) -> DeviceArray:
        return self.device.empty((len(self._past), rows, slots, self._model.head_dim), self._cache_dtype)

    def _zeros(self, rows: int, slots: int) -> DeviceArray:
        # A masked slot must hold a finite number, since 0 times NaN is NaN.
        return self.device.zeros((len(self._past), rows, slots, self._model.head_dim), self._cache_dtype)

    def _slots(self, width: int, longest: int) -> int:
        most = self._limits.past if self._limits else self._model.max_positions
        return min(_round_up(width + 1, SLOTS), longest, most)

    def _check_limits(self, batch: int, width: int, capacity: int, factor_sets: int) -> None:
        if self._limits is None:
            return
        given = LimitsSpec(batch=batch, sequence=width, past=capacity - 1, factor_sets=factor_sets)
        for name in given.__struct_fields__:
            if (number := getattr(given, name)) > (limit := getattr(self._limits, name)):
                error = LengthError if name in ("sequence", "past") else InputError
                raise error(
                    f"{name} {number}: the engines of this bundle take {limit}; export it again with a larger "
                    f"`{name}` under [limits] of its recipe"
                )


def _placed(sets: FactorSets) -> dict[str, DeviceArray]:
    """Return the factor tensors. Raises TypeError for sets that `DeviceBackend.place` has not moved to the device."""
    tensors = {name: array for name, array in sets.tensors.items() if isinstance(array, DeviceArray)}
    if len(tensors) < len(sets.tensors):
        raise TypeError("these factors are not on the device: pass what Backend.place returns")
    return tensors


def _mask(packed: IntArray, start: int, width: int, slots: int) -> IntArray:
    """Return int64 [batch, slots + 1]: each row up to its gap and from `start` on; the last column is the new
    token's.
    """
    slot = np.arange(slots + 1)
    mask: IntArray = ((slot < packed[:, None]) | ((slot >= start) & (slot < width)) | (slot == slots)).astype(np.int64)
    return mask


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
