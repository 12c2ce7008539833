"""Named adapters: factor sets that callers choose by name, row by row."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from chameleon_deploy.contract.adapter_file import (
    Factors,
    StoredAdapter,
    check_rank,
    max_rank,
    most_bytes,
    read_adapter,
    write_adapter,
)
from chameleon_deploy.contract.bundle import Bundle, FloatArray, file_sha256
from chameleon_deploy.contract.manifest import ADAPTER_NAME, AdaptationSpec, factor_names, is_adapter_name
from chameleon_deploy.contract.peft_lora import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    TENSOR_FILE,
    most_tensor_bytes,
    read_invocation,
    read_peft,
)
from chameleon_deploy.errors import AdapterError, CheckpointError, InputError
from chameleon_deploy.runtime.factors import FactorSets, blend_sets, no_factors, rank_of
from chameleon_deploy.runtime.inputs import checked_path
from chameleon_deploy.store import local_cache, remote

ADAPTERS = "adapters"  # the kind of these entries in the local cache
CONVERTED = "adapter.safetensors"
MAX_WEIGHT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    key      of its factor set; another for an adapter that is loaded later under the same name
    file     where it is read again when its factors have left the memory, and the SHA-256 of what was loaded; None for
             an adapter of the bundle, whose factors stay
    rank     without padding
    targets  the layers that it updates
    size     bytes of its factors in memory
    invocation_tokens  of an activated adapter, else none: it updates a text from the last of them on
    """

    key: tuple[str, int]
    file: tuple[Path, str] | None
    rank: int
    targets: tuple[str, ...]
    size: int
    invocation_tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.key[0]

    @property
    def digest(self) -> str | None:
        """Return the SHA-256 of its file; None for an adapter of the bundle."""
        return self.file[1] if self.file else None


@dataclass(frozen=True, eq=False)
class Blend:
    """The update of a row: the weighted sum of adapters' updates. Its factors stay, whatever is unloaded or replaced.

    parts  each adapter, its one set and its weight, by name; none for the base model
    """

    parts: tuple[tuple[Adapter, FactorSets, float], ...]

    @property
    def key(self) -> Hashable:
        """Return a key that is equal for blends of the same adapters with the same weights."""
        return tuple((adapter.key, weight) for adapter, _, weight in self.parts) or "none"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter, _, _ in self.parts)

    @property
    def is_activated(self) -> bool:
        """Return whether it updates a text from its last invocation on, and not from its first token."""
        return any(adapter.invocation_tokens for adapter, _, _ in self.parts)

    def start(self, ids: Sequence[int]) -> int | None:
        """Return the token from which on it updates a text and what follows; None if nothing is updated."""
        if not self.is_activated:
            return 0
        ((adapter, _, _),) = self.parts
        return last_place(ids, adapter.invocation_tokens)

    def make(self, spec: AdaptationSpec) -> FactorSets:
        """Return the update as a stack of one set. Raises NumericError for weights that make it infinite."""
        return blend_sets([(sets, weight) for _, sets, weight in self.parts]) if self.parts else no_factors(spec)


def last_place(ids: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Return where the last occurrence of some tokens in a text begins; None if there is none."""
    count = len(ids) - len(tokens) + 1
    if count < 1:
        return None
    text, found = np.asarray(ids), np.ones(count, bool)
    for i, token in enumerate(tokens):
        found &= text[i : i + count] == token
    places = np.flatnonzero(found)
    return int(places[-1]) if len(places) else None


# The name of a row's adapter, weights by name, or None for the base model; a Blend for one that is held already.
AdapterChoice = str | Mapping[str, float] | Blend | None


class Adapters:
    """The adapters of a bundle, and those that were loaded from files. For any number of threads.

    max_bytes  of the factors of files that stay in memory; those used least recently leave first. None is no limit
    """

    def __init__(self, bundle: Bundle, enter: Callable[[Factors], Factors]) -> None:
        """Take the bundle's own adapters.

        enter  converts factors to the basis of the decoder (basis.py)
        """
        self.max_bytes: int | None = None
        self._spec: AdaptationSpec = bundle.manifest.adaptation
        self._vocab_size = bundle.manifest.model.vocab_size
        self._enter, self._numbers, self._lock = enter, itertools.count(), threading.Lock()
        self._head = bundle.token_embedding().stored
        self._named: dict[str, Adapter] = {}
        self._uses: Counter[tuple[str, int]] = Counter()
        self._sets: OrderedDict[tuple[str, int], FactorSets] = OrderedDict()  # the most recently used last
        self._held: WeakValueDictionary[tuple[str, int], FactorSets] = WeakValueDictionary()  # by rows, or above
        if self._spec.adapters:
            tensors = bundle.lora()
            for i, name in enumerate(self._spec.adapters):
                sets = self._entered({tensor: array[i] for tensor, array in tensors.items()})
                tokens = self._spec.invocation_tokens.get(name, ())
                updating = [each.name for each in self._spec.targets if tensors[factor_names(each.name)[1]][i].any()]
                adapter = self._named[name] = self._adapter(name, sets, updating, tokens)
                self._sets[adapter.key] = sets

    @property
    def names(self) -> list[str]:
        return list(self._named)

    def __contains__(self, adapter: Adapter) -> bool:
        """Return whether an adapter is still loaded, and not another under its name."""
        return self._named.get(adapter.name) == adapter

    def __getitem__(self, name: str) -> Adapter:
        """Return an adapter. Raises AdapterError for a name that no adapter has."""
        adapter = self._named.get(name) if isinstance(name, str) else None
        if adapter is None:
            names = self.names
            shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise AdapterError(f"no adapter is named {name!r:.80}: loaded are {shown or 'none'}", "adapters")
        return adapter

    def uses(self, adapter: Adapter) -> int:
        """Return how many texts have chosen an adapter, alone or with others."""
        return self._uses[adapter.key]

    def load(self, name: str, path: str | os.PathLike[str], replace: bool = False) -> None:
        """Read an adapter; see `Runtime.load_adapter`."""
        if not isinstance(name, str) or not is_adapter_name(name):
            raise InputError(f"{name!r:.80} cannot name an adapter: use {ADAPTER_NAME}", "name")
        file = self._local(path)
        sets, stored = self._read(file)
        with self._lock:
            old = self._named.get(name)
            if old is not None and (old.file is None or not replace):
                what = "the bundle's own" if old.file is None else "loaded already: unload it first, or replace it"
                raise AdapterError(f"an adapter named {name!r} is {what}", "name")
            adapter = self._adapter(name, sets, stored.updating, stored.invocation_tokens, (file, stored.digest))
            self._named = {**self._named, name: adapter}
            if old is not None:
                self._forget(old)
            self._keep(adapter, sets)

    def unload(self, name: str) -> None:
        """Forget an adapter of a file. Raises AdapterError for a name that no adapter has, or one of the bundle."""
        with self._lock:
            adapter = self[name]
            if adapter.file is None:
                raise AdapterError(f"the adapter {name!r} is the bundle's own: only one from a file can be unloaded")
            self._named = {other: kept for other, kept in self._named.items() if other != name}
            self._forget(adapter)

    def blends(self, choices: Sequence[AdapterChoice]) -> list[Blend]:
        """Return what each row chose. Equal choices give the same object.

        Raises AdapterError for a name that no adapter has, a file that has changed, or ranks that are too large
        together.
        """
        found: dict[Hashable, Blend] = {}
        blends = []
        for choice in choices:
            if isinstance(choice, Blend):  # and counted when it was made
                blends.append(choice)
                continue
            weights = choice if isinstance(choice, Mapping) else {} if choice is None else {choice: 1.0}
            key = tuple(sorted(weights.items()))
            if key not in found:
                found[key] = self._blend(key)
            blends.append(found[key])
            with self._lock:
                self._uses.update(adapter.key for adapter, _, _ in found[key].parts if adapter in self)
        return blends

    def _blend(self, weights: Sequence[tuple[str, float]]) -> Blend:
        adapters = [(self[name], float(weight)) for name, weight in weights]
        blend = Blend(tuple((adapter, self.sets_of(adapter), weight) for adapter, weight in adapters))
        if len(weights) > 1:
            if activated := [adapter.name for adapter, _ in adapters if adapter.invocation_tokens]:
                message = f"{activated[0]} is activated by tokens of a text, so it has no sum with other adapters"
                raise AdapterError(message, "adapters")
            rank, most = sum(rank_of(sets) for _, sets, _ in blend.parts), max_rank(self._spec)
            if rank > most:
                names = ", ".join(name for name, _ in weights[:10])
                raise AdapterError(f"{names} have rank {rank} together: this bundle takes at most {most}", "adapters")
        return blend

    def sets_of(self, adapter: Adapter) -> FactorSets:
        """Return a stack of an adapter's one set, in memory. Raises AdapterError if its file has changed."""
        with self._lock:
            if adapter.key in self._sets:
                self._sets.move_to_end(adapter.key)
                return self._sets[adapter.key]
            if (held := self._held.get(adapter.key)) is not None:
                if adapter in self:
                    self._keep(adapter, held)
                return held
        assert adapter.file is not None  # noqa: S101  (the bundle's own never leave)
        file, digest = adapter.file
        sets, stored = self._read(file)
        if stored.digest != digest:
            raise AdapterError(f"{file} has changed since it was loaded: unload the adapter and load it again")
        with self._lock:
            sets = self._held.get(adapter.key, sets)  # another thread may have read them meanwhile
            if adapter in self:
                self._keep(adapter, sets)
        return sets

    def _adapter(
        self,
        name: str,
        sets: FactorSets,
        targets: Sequence[str],
        tokens: tuple[int, ...],
        file: tuple[Path, str] | None = None,
    ) -> Adapter:
        return Adapter((name, next(self._numbers)), file, rank_of(sets), tuple(targets), _size(sets), tokens)

    def _forget(self, adapter: Adapter) -> None:
        """Let go of the factors of an adapter that has no name any more. The lock is held."""
        self._sets.pop(adapter.key, None)
        self._uses.pop(adapter.key, None)

    def _local(self, path: str | os.PathLike[str]) -> Path:
        """Return an adapter file: that of the path, a URL's, or the one that a PEFT directory is converted to once."""
        layers = {target.name: (target.in_features, target.out_features) for target in self._spec.targets}
        limits = {CONFIG_FILE: MAX_CONFIG_BYTES, TENSOR_FILE: most_tensor_bytes(layers, self._head)}
        if remote.is_url(path):
            directory, _, name = path.rpartition("/")
            if name.endswith(".safetensors"):
                path = remote.fetch_files(directory, {name: most_bytes(self._spec)}, ADAPTERS) / name
            else:
                path = remote.fetch_files(path, limits, ADAPTERS)
        file = checked_path(path)
        if not file.is_dir():
            return file
        if not self._spec.base_digest:
            raise AdapterError(f"{file}: this bundle takes no adapters: export its base model, with --adaptable LAYERS")
        digests = _digests(file, limits)

        def build(directory: Path) -> None:
            factors, tokens = read_peft(file, layers, self._head), read_invocation(file)
            check_rank(file, len(next(iter(factors.values()))), self._spec)  # here, so that errors name the directory
            self._check_tokens(file, tokens)
            write_adapter(directory / CONVERTED, factors, self._spec, tokens)
            if _digests(file, limits) != digests:
                raise AdapterError(f"{file} has changed while it was read: load it again")

        targets = json.dumps([target.name for target in self._spec.targets])
        key = {
            **digests,
            "base": self._spec.base_digest,
            "targets": hashlib.sha256(targets.encode()).hexdigest(),
            "max_rank": str(max_rank(self._spec)),  # a rank that one bundle refuses, another may have converted
        }
        return local_cache.find_or_build(ADAPTERS, key, build) / CONVERTED

    def _keep(self, adapter: Adapter, sets: FactorSets) -> None:
        """Keep factors in memory, and let go of others beyond max_bytes. The lock is held."""
        self._sets[adapter.key] = self._held[adapter.key] = sets
        if self.max_bytes is None:
            return
        of_files = {named.key for named in self._named.values() if named.file}
        by_age = [key for key in self._sets if key in of_files]
        total = sum(_size(self._sets[key]) for key in by_age)
        for key in by_age[:-1]:
            if total <= self.max_bytes:
                return
            total -= _size(self._sets.pop(key))

    def _read(self, file: Path) -> tuple[FactorSets, StoredAdapter]:
        """Return the one set of an adapter file, and what it holds."""
        stored = read_adapter(file, self._spec)
        self._check_tokens(file, stored.invocation_tokens)
        return self._entered(stored.factors), stored

    def _check_tokens(self, file: Path, tokens: Sequence[int]) -> None:
        """Raise AdapterError unless the model has these invocation tokens."""
        if unknown := [token for token in tokens if token >= self._vocab_size]:
            raise AdapterError(
                f"{file}: its invocation_tokens hold {unknown[0]}: this bundle has {self._vocab_size} tokens"
            )

    def _entered(self, factors: Mapping[str, FloatArray]) -> FactorSets:
        entered = self._enter(factors)
        return FactorSets({name: np.ascontiguousarray(array, np.float32)[None] for name, array in entered.items()})


def _digests(directory: Path, limits: Mapping[str, int]) -> dict[str, str]:
    """Return the SHA-256 of each file of a PEFT directory. Raises CheckpointError where one is missing or too large.

    limits  the most bytes of each
    """
    digests = {}
    for name, most in limits.items():
        file = directory / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, or no plain file")
            if file.stat().st_size > most:  # before it is read
                raise CheckpointError(f"{file}: over {most} bytes are no LoRA of this model")
            digests[name] = file_sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}") from error
    return digests


def _size(sets: FactorSets) -> int:
    return sum(np.asarray(array).nbytes for array in sets.tensors.values())


def check_adapters(adapters: Sequence[AdapterChoice] | None, batch: int) -> None:
    """Raise InputError unless adapters are None or a list with a name, weights by name or None for each row."""
    if adapters is None:
        return
    if isinstance(adapters, str | bytes) or not isinstance(adapters, Sequence):
        kind = type(adapters).__name__
        raise InputError(f"adapters must be a list with a name, weights or None per text, got a {kind}", "adapters")
    if len(adapters) != batch:
        raise InputError(f"{len(adapters)} adapters for {batch} texts: pass one per text, None for none", "adapters")
    for choice in adapters:
        if isinstance(choice, Mapping):
            _check_weights(choice)
        elif choice is not None and not isinstance(choice, str | Blend):
            kind = type(choice).__name__
            raise InputError(f"an adapter must be a name, weights by name or None, got a {kind}", "adapters")


def _check_weights(weights: Mapping[Any, Any]) -> None:
    """Raise InputError unless these are finite numbers of float32 by names."""
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise InputError(f"weights of adapters go by name, got a {type(name).__name__}", "adapters")
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not is_number or not abs(weight) <= MAX_WEIGHT:
            raise InputError(f"the weight of adapter {name!r:.80} is no finite number: {weight!r:.40}", "adapters")
