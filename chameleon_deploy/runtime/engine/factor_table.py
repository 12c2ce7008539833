"""The factor sets of a batch, stacked for the decoder and counted by reference."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.contract.manifest import in_head
from chameleon_deploy.errors import NumericError
from chameleon_deploy.runtime.factor_sources import FactorSource
from chameleon_deploy.runtime.factors import FactorSets, RowFactors, zero_set

NO_UPDATE: Hashable = "no update"  # the key of a set of zeros, which a table has in any case


class FactorTable:
    """A stack of immutable factor sets. A set is made for its first row and removed with its last.

    Sets of a smaller rank than the largest are padded with zeros, which add nothing to a row's logits.

    sets  the stack; the same object until a set is added or removed
    """

    def __init__(self, max_sets: int) -> None:
        self._max_sets = max_sets
        self._keys: list[Hashable] = []  # in the order of the stack
        self._ranks: list[int] = []
        self._nothing: list[bool] = []  # whether each updates nothing
        self._references: dict[Hashable, int] = {}
        self._trunk_digests: dict[Hashable, bytes] = {}
        self._memory: dict[str, FloatArray] = {}  # of the stack, as large as the largest rank so far needs
        self._tensors: dict[str, FloatArray] = {}  # [max_sets, rank, in_features or out_features], views of it
        self.sets = FactorSets({})

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._references

    @property
    def is_full(self) -> bool:
        return len(self) >= self._max_sets

    def index(self, key: Hashable) -> int:
        return self._keys.index(key)

    def of_rows(self, keys: Sequence[Hashable]) -> RowFactors:
        """Return the stack and the place of each row's set in it."""
        return RowFactors(self.sets, np.array([self.index(key) for key in keys], np.int64))

    def set_of(self, key: Hashable) -> RowFactors:
        """Return the single set of a key, in its own rank: the same array whatever else the table holds."""
        if key == NO_UPDATE:
            return self._zeros()
        i = self.index(key)
        alone = {name: tensor[i : i + 1, : self._ranks[i]] for name, tensor in self._tensors.items()}
        return RowFactors(FactorSets(alone, self._nothing[i]), np.zeros(1, np.int64))

    def _zeros(self) -> RowFactors:
        return RowFactors(zero_set(self.sets), np.zeros(1, np.int64))

    def trunk_digest(self, key: Hashable) -> bytes:
        """Return the SHA-256 of a set's values that reach the trunk: of none where only the head is updated."""
        if key not in self._trunk_digests:
            digest = hashlib.sha256()
            for name, values in sorted(self.set_of(key).sets.tensors.items()):
                if not in_head(name):
                    array = np.ascontiguousarray(values)
                    digest.update(np.array(array.shape, np.int64).tobytes() + array.tobytes())
            self._trunk_digests[key] = digest.digest()
        return self._trunk_digests[key]

    def stack(self) -> FactorSets:
        """Return the stack as it is now, which later changes of the table leave alone."""
        return self.sets[np.arange(len(self))]

    def acquire(self, source: FactorSource) -> None:
        """Count one more row of a set, which is made first if it is not resident. `is_full` must be false then.

        Raises NumericError for a set that is not finite, and whatever making it raises.
        """
        if source.key not in self:
            self._append(source.key, source.make())
        self._references[source.key] = self._references.get(source.key, 0) + 1

    def release(self, key: Hashable) -> None:
        """Count one row less."""
        self._references[key] -= 1
        if not self._references[key]:
            del self._references[key]
            self._trunk_digests.pop(key, None)
            self._remove(self.index(key))

    def _append(self, key: Hashable, made: FactorSets) -> None:
        factors = {name: np.asarray(array, np.float32)[0] for name, array in made.tensors.items()}
        # A set that is not finite would spread to every row: 0 * inf is NaN in the product over all sets.
        # Its least and largest value tell, in half the time of isfinite, which writes an array.
        if not all(np.isfinite(array.min()) and np.isfinite(array.max()) for array in factors.values()):
            raise NumericError("the factors of a request are not finite: check the hypernetwork")
        rank = len(next(iter(factors.values()))) if factors else 1
        if not self._tensors:
            self._tensors = {n: np.zeros((self._max_sets, 0, a.shape[1]), np.float32) for n, a in factors.items()}
            self._memory = {n: tensor.reshape(-1) for n, tensor in self._tensors.items()}
        self._keys.append(key)
        self._ranks.append(rank)
        self._nothing.append(made.updates_nothing)
        self._set_rank()
        for name, array in factors.items():
            self._tensors[name][len(self) - 1, :rank] = array
            self._tensors[name][len(self) - 1, rank:] = 0
        self._restack()

    def _remove(self, i: int) -> None:
        """Remove set i; the last set moves into its place."""
        for tensor in self._tensors.values():
            tensor[i] = tensor[len(self) - 1]
        of_sets: tuple[list[Any], ...] = (self._keys, self._ranks, self._nothing)
        for values in of_sets:
            values[i] = values[-1]
            values.pop()
        if self._keys:
            self._set_rank()
        self._restack()

    def _set_rank(self) -> None:
        """Set the stack's rank to the largest of its sets; a larger rank would waste computation.

        Only a rank larger than any before takes new memory: a decoder's calls keep the stack that they were bound to.
        """
        rank = max(self._ranks)
        for name, old in self._tensors.items():
            if old.shape[1] != rank:
                kept = old[: len(self), :rank].copy()  # the new stack overlaps the old one
                new = self._tensors[name] = self._allocate(name, rank, old.shape[2])
                new[: len(self), : kept.shape[1]] = kept
                new[: len(self), kept.shape[1] :] = 0

    def _allocate(self, name: str, rank: int, width: int) -> FloatArray:
        size = self._max_sets * rank * width
        if size > self._memory[name].size:
            self._memory[name] = np.zeros(size, np.float32)  # its pages are taken as sets are written
        return self._memory[name][:size].reshape(self._max_sets, rank, width)

    def _restack(self) -> None:
        stack = {name: tensor[: len(self)] for name, tensor in self._tensors.items()}
        self.sets = FactorSets(stack, all(self._nothing))


class MadeFactors(FactorTable):
    """The sets of rows that are known from the start, all made and kept. The key of a set is its place in the stack."""

    def __init__(self, sets: FactorSets) -> None:
        super().__init__(len(sets))
        self.sets = sets
        self._keys = list(range(len(sets)))
        self._references = dict.fromkeys(self._keys, 1)  # of this table, so that none is removed

    def set_of(self, key: Hashable) -> RowFactors:
        if key == NO_UPDATE:
            return self._zeros()
        # No copy: a set among others costs the decoder next to nothing.
        return RowFactors(self.sets, np.array([key], np.int64))

    def stack(self) -> FactorSets:
        return self.sets
