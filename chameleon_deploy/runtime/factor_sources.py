"""The one place that turns (mode, tenants, factors, adapters, conditioning) into factors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from chameleon_deploy.contract.adapter_file import Factors
from chameleon_deploy.contract.bundle import Bundle, FloatArray, IntArray, Mode
from chameleon_deploy.errors import ModeError, ProviderError
from chameleon_deploy.runtime import adaptation as adapting
from chameleon_deploy.runtime.adaptation import Adapt, Adaptation
from chameleon_deploy.runtime.adapters import AdapterChoice, Adapters, Blend, check_adapters
from chameleon_deploy.runtime.backend import Backend
from chameleon_deploy.runtime.basis import enter_basis
from chameleon_deploy.runtime.encoder import Encoder
from chameleon_deploy.runtime.factors import FactorSets, RowFactors, check_factors, no_factors, stack_sets
from chameleon_deploy.runtime.inputs import per_prompt


@dataclass(frozen=True)
class FactorSource:
    """The source of a row's factor set. Nothing is generated before it is made.

    key   equal for rows that share a set
    item  what the set is made of: a conditioning vector, the number of a cluster, or adapters with their weights
    make_all  returns a stack of the sets of items, where the decoder reads them; the same for all rows of a call
    adapters  the names that were chosen, in mode static with adapters
    """

    key: Hashable
    item: Any
    make_all: Callable[[Sequence[Any]], FactorSets]
    adapters: tuple[str, ...] = ()

    def make(self) -> FactorSets:
        """Return a stack of that set only, in memory or on a device."""
        return self.make_all([self.item])


@dataclass(frozen=True)
class RowSources:
    """The sources of the factors of a call's rows.

    sources     of each set
    factor_ids  int64 [batch], which of them each row has
    starts      see RowFactors
    """

    sources: list[FactorSource]
    factor_ids: IntArray
    starts: IntArray | None = None


class FactorSources:
    """Embeds and clusters texts, and says what their factors are made of. For any number of threads.

    mode      of calls that name none
    adapters  of the bundle, and loaded from files
    """

    def __init__(self, bundle: Bundle, backend: Backend, mode: Mode, encoder: Encoder | None = None) -> None:
        """Take a bundle, and the backend and the encoder that were opened for it.

        Raises ModeError for a mode that it cannot serve.
        """
        self.mode, self._backend, self._encoder = mode, backend, encoder
        self._manifest = bundle.manifest
        self._token_embedding, self._centroids = bundle.token_embedding(), bundle.centroids()
        spec = bundle.manifest.adaptation
        # A function, not a method: a runtime in a cycle of references would outlive its last user.
        self._enter = partial(enter_basis, spec=spec, basis=bundle.basis())
        self.adapters = Adapters(bundle, self._enter)
        has_lora = spec.regime == "lora" and not spec.adapters
        self._lora = self._entered(FactorSets(bundle.lora())) if has_lora else None
        # the decoder has factor inputs in every mode
        self._no_factors = backend.place(no_factors(spec))
        self._centroid_factors: FactorSets | None = None
        self._check_served(mode)
        if mode == "centroid":
            self._factors_of_centroids()

    def resolve(self, adapt: Adapt, batch: int) -> Adapt:
        """Return the options of a call of so many texts with its mode, and conditioning as an array.

        Raises ModeError or InputError for options that do not fit the bundle or the texts.
        """
        check_adapters(adapt.adapters, batch)
        mode = self.mode if adapt.mode is None else adapt.mode
        self._check_served(mode)
        adapting.check_tenants(mode, adapt.tenants, batch)
        if adapt.factors is not None and mode != "static":
            raise ModeError(f"factors were passed in mode {mode!r}: pass mode='static' with them", "factors")
        size = self._manifest.adaptation.conditioning_size
        given = adapt.conditioning if adapt.adapt_text is None else self._described(mode, adapt.adapt_text, batch)
        given = adapting.check_conditioning(mode, given, size, batch)
        return replace(adapt, mode=mode, conditioning=given, adapt_text=None)

    def _described(self, mode: Mode, descriptions: str | Sequence[str], batch: int) -> FloatArray:
        """Return the vectors of descriptions, one for all texts or one per text. Raises ModeError or InputError."""
        if self._encoder is None:
            raise ModeError("adapt_text needs a bundle that was exported with --encoder", "adapt_text")
        if mode != "request":
            raise ModeError(f"mode {mode!r} with adapt_text: descriptions go with mode 'request'", "adapt_text")
        return self._encoder.conditioning(per_prompt("adapt_text", descriptions, batch))

    def embed(self, rows: Sequence[Sequence[int]], adapt_tokens: int | None = None) -> tuple[FloatArray, IntArray]:
        """Return embeddings [batch, hidden] and cluster ids [batch]."""
        leading = [ids[:adapt_tokens] for ids in rows]
        eos_token_id = self._manifest.model.eos_token_id
        embeddings = adapting.embed(leading, self._token_embedding, self._manifest.adaptation, eos_token_id)
        return embeddings, adapting.assign(embeddings, self._centroids)

    def embed_for_factors(
        self, rows: Sequence[Sequence[int]], adapt_tokens: int | None = None
    ) -> tuple[FloatArray, IntArray]:
        """Do as `embed`, but return embeddings [batch, 0] of a bundle without clusters and hypernetwork.

        They would take longer than all else that a long prompt waits for before it is read.
        """
        spec = self._manifest.adaptation
        if spec.regime == "chameleon" or spec.num_clusters:
            return self.embed(rows, adapt_tokens)
        return np.empty((len(rows), 0), np.float32), np.full(len(rows), -1, np.int64)

    def adapt(self, rows: Sequence[Sequence[int]], adapt: Adapt) -> Adaptation:
        """Embed and cluster rows, and make their factors."""
        adapt = self.resolve(adapt, len(rows))
        embeddings, cluster_ids = self.embed(rows, adapt.adapt_tokens)
        found = self.of_rows(adapt, rows, embeddings, cluster_ids)
        sets = found.sources[0].make_all([source.item for source in found.sources])
        return Adaptation(embeddings, cluster_ids, RowFactors(sets, found.factor_ids, found.starts))

    def of_rows(
        self, adapt: Adapt, rows: Sequence[Sequence[int]], embeddings: FloatArray, cluster_ids: IntArray
    ) -> RowSources:
        """Return the sources of the factors of a call's rows.

        adapt  from `resolve`

        Raises ModeError, FactorsError, AdapterError, or ProviderError for activated adapters where there are none.
        """
        mode, first = adapt.mode, np.zeros(len(embeddings), np.int64)
        if mode == "none":
            return RowSources([FactorSource("none", item=None, make_all=lambda _: self._no_factors)], first)
        if adapt.adapters is not None:
            return self._of_adapters(adapt.adapters, rows)
        if mode == "static":
            sets = self._static_factors(adapt.factors)
            own = sets if adapt.factors is None else sets[np.array([0])]  # a copy, which the caller cannot change
            key = "static" if adapt.factors is None else object()
            return RowSources([FactorSource(key, item=None, make_all=lambda _: own)], first)
        if mode == "centroid":
            present, factor_ids = np.unique(cluster_ids, return_inverse=True)
            sources = [FactorSource(c, c, self._factors_of_clusters) for c in present.tolist()]
            return RowSources(sources, factor_ids.astype(np.int64))
        if adapt.conditioning is not None:
            given = np.asarray(adapt.conditioning, np.float32)
            keys = [vector.tobytes() for vector in given]
            distinct = list(dict.fromkeys(keys))
            vectors, factor_ids = given[[keys.index(key) for key in distinct]], _numbers(distinct, keys)
        elif mode == "request":
            vectors, factor_ids = embeddings, np.arange(len(embeddings))
        else:
            vectors, factor_ids = adapting.conditioning(embeddings, cluster_ids, adapt.tenants)
        # Equal vectors have equal factors, for any tenant.
        return RowSources([FactorSource(vector.tobytes(), vector, self._generate) for vector in vectors], factor_ids)

    def _of_adapters(self, choices: Sequence[AdapterChoice], rows: Sequence[Sequence[int]]) -> RowSources:
        held = self.adapters.blends(choices)
        starts = None
        if any(blend.is_activated for blend in held):
            if self._backend.provider != "cpu":
                message = f"activated adapters run on provider 'cpu', not on {self._backend.provider!r}"
                raise ProviderError(message, "adapters")
            found = [blend.start(ids) for blend, ids in zip(held, rows, strict=True)]
            # What nothing activates is the base model, and so is what follows it.
            held = [Blend(()) if start is None else blend for blend, start in zip(held, found, strict=True)]
            starts = np.array([start or 0 for start in found], np.int64)
        blends = {blend.key: blend for blend in held}
        # A source holds the adapters' sets, and their sum is made for its first row.
        sources = [FactorSource(key, blend, self._blended, blend.names) for key, blend in blends.items()]
        return RowSources(sources, _numbers(list(blends), [blend.key for blend in held]), starts)

    def _blended(self, blends: Sequence[Blend]) -> FactorSets:
        return self._backend.place(stack_sets([blend.make(self._manifest.adaptation) for blend in blends]))

    def _static_factors(self, factors: Factors | None) -> FactorSets:
        if factors is not None:
            return self._entered(check_factors(factors, self._manifest.adaptation))
        if self.adapters.names:
            raise ModeError(
                "mode 'static' of a bundle with adapters: pass adapters=, a name or None per text", "adapters"
            )
        if self._lora is None:
            names = ", ".join(self._manifest.adaptation.factor_widths)
            raise ModeError(f"mode 'static' needs factors={{{names}}}: this bundle has no trained LoRA", "factors")
        return self._lora

    def _generate(self, vectors: Sequence[FloatArray]) -> FactorSets:
        """Return the sets of conditioning vectors [factor_sets, size], where and as the decoder reads them."""
        sets = self._backend.generate_factors(np.stack(vectors))
        return self._entered(sets) if self._manifest.has_basis else sets

    def _entered(self, sets: FactorSets) -> FactorSets:
        """Return sets of plain layers as the decoder reads them."""
        entered = self._enter({name: np.asarray(array, np.float32) for name, array in sets.tensors.items()})
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in entered.items()}
        return self._backend.place(FactorSets(arrays))

    def _factors_of_centroids(self) -> FactorSets:
        # Two threads may both compute it the first time; they get the same values.
        if self._centroid_factors is None:
            self._centroid_factors = self._generate(list(self._centroids))
        return self._centroid_factors

    def _factors_of_clusters(self, cluster_ids: Sequence[int]) -> FactorSets:
        return self._factors_of_centroids()[np.array(cluster_ids)]

    def _check_served(self, mode: Mode) -> None:
        adapting.check_mode(mode)
        available = self._manifest.adaptation.modes
        if mode not in available:
            raise ModeError(
                f"mode {mode!r} cannot be served by this bundle of regime {self._manifest.adaptation.regime!r} with "
                f"{self._manifest.adaptation.num_clusters} clusters: choose one of {', '.join(available)}",
                "mode",
            )


def _numbers(names: Sequence[Hashable], chosen: Sequence[Hashable]) -> IntArray:
    """Return the place of each chosen name among the names.  -> int64 [chosen]"""
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[name] for name in chosen], np.int64)
