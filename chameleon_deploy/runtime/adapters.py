"""Named adapters: factor sets that callers choose by name, row by row."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from chameleon_deploy.adapter_file import read_adapter
from chameleon_deploy.bundle import Bundle
from chameleon_deploy.errors import AdapterError, InputError
from chameleon_deploy.manifest import ADAPTER_NAME, AdaptationSpec, is_adapter_name
from chameleon_deploy.runtime.factors import Factors, FactorSets, RowFactors, no_factors, stack_sets
from chameleon_deploy.runtime.inputs import checked_path


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    key   of its factor set; another for an adapter that is loaded later under the same name
    sets  a stack of its one set, in memory
    """

    key: tuple[str, int]
    sets: FactorSets


class Adapters:
    """The adapters of a bundle, and those that were loaded from files. For any number of threads."""

    def __init__(self, bundle: Bundle, enter: Callable[[Factors], Factors]) -> None:
        """Take the bundle's own adapters.

        enter  converts factors to the basis of the decoder (basis.py)
        """
        self._spec: AdaptationSpec = bundle.manifest.adaptation
        self._enter, self._numbers, self._lock = enter, itertools.count(), threading.Lock()
        self._named: dict[str, Adapter] = {}  # replaced, never changed: a reader needs no lock
        if self._spec.adapters:
            tensors = bundle.lora()
            for i, name in enumerate(self._spec.adapters):
                self._add(name, {tensor: array[i] for tensor, array in tensors.items()})

    @property
    def names(self) -> list[str]:
        return list(self._named)

    def __getitem__(self, name: str) -> Adapter:
        """Return an adapter. Raises AdapterError for a name that no adapter has."""
        try:
            return self._named[name]
        except (KeyError, TypeError):
            known = ", ".join(self.names[:10]) or "none"
            raise AdapterError(f"no adapter is named {name!r:.80}: loaded are {known}") from None

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Read an adapter file; see `Runtime.load_adapter`."""
        if not isinstance(name, str) or not is_adapter_name(name):
            raise InputError(f"{name!r:.80} cannot name an adapter: use {ADAPTER_NAME}")
        if name in self._named:
            raise AdapterError(f"an adapter named {name!r} is loaded already: unload it first, or choose another name")
        self._add(name, read_adapter(checked_path(path), self._spec))

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises AdapterError for a name that no adapter has."""
        with self._lock:
            self[name]
            self._named = {other: adapter for other, adapter in self._named.items() if other != name}

    def of_rows(self, names: Sequence[str | None]) -> RowFactors:
        """Return a stack of the sets that rows use, in memory; None is a set of zeros. Raises AdapterError."""
        chosen = list(dict.fromkeys(names))
        sets = [no_factors(self._spec) if name is None else self[name].sets for name in chosen]
        return RowFactors(stack_sets(sets), np.array([chosen.index(name) for name in names], np.int64))

    def _add(self, name: str, factors: Factors) -> None:
        entered = self._enter(factors)
        sets = FactorSets({tensor: np.ascontiguousarray(array, np.float32)[None] for tensor, array in entered.items()})
        with self._lock:
            self._named = {**self._named, name: Adapter((name, next(self._numbers)), sets)}


def check_adapters(adapters: Sequence[str | None] | None, batch: int) -> None:
    """Raise InputError unless adapters are None or a list with a name or None for each row."""
    if adapters is None:
        return
    if isinstance(adapters, str | bytes) or not isinstance(adapters, Sequence):
        raise InputError(f"adapters must be a list with a name or None per text, got a {type(adapters).__name__}")
    if len(adapters) != batch:
        raise InputError(f"{len(adapters)} adapters for {batch} texts: pass one per text, None for none")
    if wrong := [name for name in adapters if name is not None and not isinstance(name, str)]:
        raise InputError(f"an adapter must be a name or None, got a {type(wrong[0]).__name__}")
