"""Factors of low-rank updates: one set, a stack of sets, and the set that each row uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.adapter_file import Factors
from chameleon_deploy.contract.bundle import AdaptationSpec, IntArray
from chameleon_deploy.errors import FactorsError, NumericError


class FactorArray(Protocol):
    """The common interface of an array in memory (numpy) and an array on a device (DeviceArray)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: IntArray, /) -> FactorArray:
        """Copy entries along the first axis, in the order of the indices."""

    def __array__(self, dtype: Any = None, /) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class FactorSets:
    """A stack of factor sets, in memory or on a device. len() is their number; an array of indices selects sets.

    A bundle without targets has no tensors, and the one set that updates nothing.

    tensors  "<target>.lora_A" float32 [factor_sets, rank, in_features] and "<target>.lora_B" float32
             [factor_sets, rank, out_features] of every target; alpha is already multiplied into B
    updates_nothing  whether the sets were made as zeros, so that a decoder need not multiply them
    """

    tensors: Mapping[str, FactorArray]
    updates_nothing: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else 1

    def __getitem__(self, indices: IntArray) -> FactorSets:
        return replace(self, tensors={name: array[indices] for name, array in self.tensors.items()})

    def in_memory(self) -> FactorSets:
        """Return the same sets as numpy arrays; sets on a device are copied."""
        return replace(self, tensors={name: np.asarray(array, np.float32) for name, array in self.tensors.items()})


@dataclass(frozen=True)
class RowFactors:
    """A stack of factor sets, and the set that each row of a batch uses.

    factor_ids  int64 [batch], indices into `sets`: the decoder's input with that name
    starts      int64 [batch], the token from which on a row's set updates it: those before it are the base model's.
                None is the first for all rows
    """

    sets: FactorSets
    factor_ids: IntArray
    starts: IntArray | None = None

    def rows(self, indices: IntArray) -> RowFactors:
        """Return the same sets for the selected rows, in the order of the indices."""
        return RowFactors(self.sets, self.factor_ids[indices], None if self.starts is None else self.starts[indices])

    def later(self) -> list[int]:
        """Return the tokens, in ascending order, at which the update of some row begins, without the first."""
        return [] if self.starts is None else [start for start in np.unique(self.starts).tolist() if start]

    def at(self, rows: npt.ArrayLike, positions: npt.ArrayLike) -> RowFactors:
        """Return the factors of tokens, each as a row of its own. The sets must be in memory if some have none yet.

        rows, positions  of the tokens, [n] each
        """
        chosen = self.factor_ids[np.asarray(rows)]
        if self.starts is None or not (inactive := np.asarray(positions) < self.starts[np.asarray(rows)]).any():
            return RowFactors(self.sets, chosen)
        nothing = zero_set(self.sets)
        if inactive.all():
            return RowFactors(nothing, np.zeros_like(chosen))
        return RowFactors(stack_sets([self.sets, nothing]), np.where(inactive, len(self.sets), chosen))


def check_factors(factors: Factors, spec: AdaptationSpec) -> FactorSets:
    """Return a stack of the one set that a caller passed; its rank may differ from the bundle's.

    Raises FactorsError for missing or unknown tensors, a dtype other than float32, wrong shapes, NaN or infinity.
    """
    try:
        return _checked(factors, spec.factor_widths)
    except FactorsError as error:
        error.argument = "factors"
        raise


def _checked(factors: Factors, widths: Mapping[str, int]) -> FactorSets:
    if not isinstance(factors, Mapping) or set(factors) != set(widths):
        found = sorted(factors) if isinstance(factors, Mapping) else f"a {type(factors).__name__}"
        raise FactorsError(f"factors hold {found}: pass a dict with the arrays {', '.join(widths)}")
    try:
        arrays = {name: np.asarray(factors[name]) for name in widths}
    except ValueError as error:  # nested lists of unequal lengths
        raise FactorsError(f"factors hold something else than arrays: {error}") from error
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise FactorsError(f"{name} has dtype {array.dtype}, expected float32")
        if array.ndim != 2 or array.shape[1] != widths[name] or not len(array):
            raise FactorsError(f"{name} has shape {array.shape}, expected (rank, {widths[name]})")
        if not np.isfinite(array).all():
            raise FactorsError(f"{name} holds NaN or infinity")
    if len({len(array) for array in arrays.values()}) > 1:
        raise FactorsError("; ".join(f"{name} has rank {len(array)}" for name, array in arrays.items()) + ": use one")
    return FactorSets({name: np.ascontiguousarray(array)[None] for name, array in arrays.items()})


def no_factors(spec: AdaptationSpec) -> FactorSets:
    """Return one set of zeros of rank 1, which leaves the base model unchanged."""
    return _zeros(spec.factor_widths)


def zero_set(sets: FactorSets) -> FactorSets:
    """Return one set of zeros of rank 1 for the layers of other sets."""
    return _zeros({name: array.shape[2] for name, array in sets.tensors.items()})


def _zeros(widths: Mapping[str, int]) -> FactorSets:
    zeros = {name: np.zeros((1, 1, width), np.float32) for name, width in widths.items()}
    return FactorSets(zeros, updates_nothing=True)


def rank_of(sets: FactorSets) -> int:
    """Return the rank of one set in memory without the zeros that pad it, at least 1."""
    arrays = [np.asarray(array)[0] for array in sets.tensors.values()]
    rank = len(arrays[0]) if arrays else 1
    while rank > 1 and not any(array[rank - 1].any() for array in arrays):
        rank -= 1
    return rank


def blend_sets(parts: Sequence[tuple[FactorSets, float]]) -> FactorSets:
    """Return the weighted sum of updates as one set: their ranks side by side, the weights multiplied into B.

    parts  single sets in memory with their weights, at least one

    Raises NumericError for factors that a weight makes infinite, which would spread to every row of a call.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    ranks = [rank_of(sets) for sets, _ in parts]
    tensors = {}
    try:
        for name in parts[0][0].tensors:
            arrays = [np.asarray(sets.tensors[name])[:, :rank] for (sets, _), rank in zip(parts, ranks, strict=True)]
            if name.endswith(".lora_B"):
                with np.errstate(over="raise"):
                    arrays = [array * np.float32(weight) for array, (_, weight) in zip(arrays, parts, strict=True)]
            tensors[name] = np.concatenate(arrays, axis=1)
    except FloatingPointError as error:
        raise NumericError("the weights of adapters make infinite factors: choose smaller ones") from error
    return FactorSets(tensors)


def stack_sets(stacks: Sequence[FactorSets]) -> FactorSets:
    """Return all sets of some stacks in memory as one stack; smaller ranks are padded with zeros."""
    if len(stacks) == 1:
        return stacks[0]
    tensors = {}
    for name in stacks[0].tensors:
        arrays = [np.asarray(stack.tensors[name]) for stack in stacks]
        sizes = sum(map(len, arrays)), max(array.shape[1] for array in arrays), arrays[0].shape[2]
        tensors[name] = np.zeros(sizes, np.float32)
        start = 0
        for array in arrays:
            tensors[name][start : start + len(array), : array.shape[1]] = array
            start += len(array)
    return FactorSets(tensors, all(stack.updates_nothing for stack in stacks))
