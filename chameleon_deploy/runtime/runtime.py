"""The runtime: load a bundle, adapt a batch, score it, generate from it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import Bundle, FloatArray, IntArray, Mode, default_mode, start_opening
from chameleon_deploy.contract.provenance import TrustedKeys
from chameleon_deploy.errors import InputError, ModeError
from chameleon_deploy.runtime import adaptation as adapting
from chameleon_deploy.runtime.adaptation import Adaptation
from chameleon_deploy.runtime.adapters import Adapters, check_adapters
from chameleon_deploy.runtime.backend import Backend
from chameleon_deploy.runtime.basis import enter_basis
from chameleon_deploy.runtime.factor_table import FactorSource
from chameleon_deploy.runtime.factors import Factors, FactorSets, RowFactors, check_factors, no_factors
from chameleon_deploy.runtime.generation import Generation, OnError, Token, begin_rows, stream_tokens
from chameleon_deploy.runtime.inputs import Texts, check_threads, checked_path, encode, integer
from chameleon_deploy.runtime.prompt_lookup import stream_speculated
from chameleon_deploy.runtime.providers import check_provider, open_backend
from chameleon_deploy.runtime.sampling_settings import Sampling
from chameleon_deploy.runtime.scoring import Score, score_rows
from chameleon_deploy.runtime.tokenizer import load_tokenizer
from chameleon_deploy.store import remote


def load(
    path: str | os.PathLike[str],
    provider: str = "cpu",
    mode: Mode | None = None,
    threads: int | None = None,
    share_weights: bool = False,
    trusted_keys: TrustedKeys | None = None,
) -> Runtime:
    """Open a bundle and make it ready to run.

    path           the directory that export wrote, or the URL of one, see `remote.fetch`
    provider       "cpu", "cuda", "tensorrt", or "auto" for the best available one, which `Runtime.provider` names
    mode           adaptation mode of calls that name none: by default "cohort", or "static" for a bundle of regime lora
    threads        threads of ONNX Runtime within one operator, at most 1,024; None lets it choose
    share_weights  on the CPU: map the weights, packed for this processor, from a file in the local cache, so that all
                   processes which load the bundle this way share one copy. The first of them writes the file.
    trusted_keys   PEM files of Ed25519 public keys: a bundle that none of them signed raises SignatureError; None
                   accepts any bundle. Needs the package `cryptography`.

    Raises a ChameleonError. Every file is checked before anything runs. An unavailable provider raises ProviderError or
    DependencyError, which says what is missing.
    """
    check_provider(provider)
    check_threads(threads)
    directory = remote.fetch(path) if remote.is_url(path) else checked_path(path)
    bundle = start_opening(directory, trusted_keys)
    try:
        return Runtime(bundle, open_backend(bundle, provider, threads, share_weights), mode)
    finally:
        bundle.require_weights()  # damaged weights explain any other error, so report them first


class Runtime:
    """A loaded bundle. It has no state of a request: one runtime serves any number of threads.

    On a GPU the factors of score, generate and stream stay in its memory; `adapt` copies them to the host by default.

    bundle, backend, mode      as passed to the constructor
    adapters                   of the bundle, and loaded from files
    manifest, tokenizer        of the bundle
    provider, graph, decoder   of the backend
    """

    def __init__(self, bundle: Bundle, backend: Backend, mode: Mode | None = None) -> None:
        """Run a bundle on a backend that was opened for it; `load` opens both.

        mode  adaptation mode of calls that name none; None takes "cohort", or "static" for a bundle of regime lora

        Raises ManifestError for a tokenizer.json that does not load, ModeError for a mode that the bundle cannot serve.
        """
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest
        self.mode: Mode = default_mode(bundle.manifest.adaptation) if mode is None else mode
        self.tokenizer = load_tokenizer(bundle.path / "tokenizer.json")
        self.provider, self.graph, self.decoder = backend.provider, backend.graph, backend.decoder
        self._token_embedding = bundle.token_embedding()
        self._centroids = bundle.centroids()
        self._lora: FactorSets | None = None
        # A function, not a method: a runtime in a cycle of references would outlive its last user.
        self._enter = partial(enter_basis, spec=bundle.manifest.adaptation, basis=bundle.basis())
        self.adapters = Adapters(bundle, self._enter)
        if self.manifest.adaptation.regime == "lora" and not self.manifest.adaptation.adapters:
            self._lora = self._entered(FactorSets(bundle.lora()))
        # the decoder has factor inputs in every mode
        self._no_factors = backend.place(no_factors(self.manifest.adaptation))
        self._centroid_factors: FactorSets | None = None
        self._check_mode(self.mode)
        if self.mode == "centroid":
            self._factors_of_centroids()

    def adapt(
        self,
        texts: Texts,
        *,
        mode: Mode | None = None,
        tenants: Sequence[Hashable] | None = None,
        factors: Factors | None = None,
        adapters: Sequence[str | None] | None = None,
        conditioning: npt.ArrayLike | None = None,
        on_device: bool = False,
    ) -> Adaptation:
        """Embed and cluster a batch and generate its factors.

        texts      texts, or lists of token ids
        mode       none, static, centroid, request, cohort or tenant; None takes the runtime's
        tenants    mode tenant: the tenant of each text, any hashable values
        factors    mode static: one set, float32 [rank, in_features or out_features] by tensor name, for example
                   "lm_head.lora_A" [rank, hidden] and "lm_head.lora_B" [rank, vocab]; alpha already applied, any rank
        adapters   mode static, which they imply: the name of each text's adapter, None for the base model
        conditioning  mode request of a bundle whose hypernetwork reads vectors of the caller: float32 [texts,
                   conditioning_size], such as the embedding of each text's task
        on_device  leave the factors in the decoder's memory, which may be a GPU's; False copies them to the host

        Raises InputError, TokenError, LengthError, ModeError, FactorsError or AdapterError.
        """
        adaptation = self._adapt(self.encode(texts), mode, tenants, factors, adapters, conditioning)
        if on_device:
            return adaptation
        row_factors = adaptation.factors
        return replace(adaptation, factors=replace(row_factors, sets=row_factors.sets.in_memory()))

    def score(
        self,
        texts: Texts,
        *,
        mode: Mode | None = None,
        tenants: Sequence[Hashable] | None = None,
        factors: Factors | None = None,
        adapters: Sequence[str | None] | None = None,
        conditioning: npt.ArrayLike | None = None,
    ) -> list[Score]:
        """Return the log-probability of every token of every text, given the tokens before it. Arguments as in
        `adapt`.
        """
        rows = self.encode(texts)
        return score_rows(rows, self.decoder, self._adapt(rows, mode, tenants, factors, adapters, conditioning))

    def generate(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int | Sequence[int] = 20,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (immutable)
        mode: Mode | None = None,
        tenants: Sequence[Hashable] | None = None,
        factors: Factors | None = None,
        adapters: Sequence[str | None] | None = None,
        conditioning: npt.ArrayLike | None = None,
        prompt_lookup_num_tokens: int = 0,
        errors: OnError = "raise",
    ) -> list[Generation]:
        """Continue every prompt. Other arguments as in `stream`.

        errors  of one row, whose logits are not finite or whose tokens cannot be decoded: "raise" raises the first and
                ends the batch; "row" ends that row alone, with finish_reason "error" and its Generation.error
        """
        if not isinstance(errors, str) or errors not in get_args(OnError):
            raise InputError(f"errors must be one of {', '.join(get_args(OnError))}, got {errors!r:.40}")
        finished: dict[int, Generation] = {}
        tokens = self._tokens(
            prompts,
            max_new_tokens,
            sampling,
            mode,
            tenants,
            factors,
            adapters,
            conditioning,
            prompt_lookup_num_tokens,
            errors,
            is_shown=False,
        )
        for token in tokens:
            if token.generation is not None:
                finished[token.row] = token.generation
        return [finished[row] for row in range(len(finished))]

    def stream(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int | Sequence[int] = 20,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (immutable)
        mode: Mode | None = None,
        tenants: Sequence[Hashable] | None = None,
        factors: Factors | None = None,
        adapters: Sequence[str | None] | None = None,
        conditioning: npt.ArrayLike | None = None,
        prompt_lookup_num_tokens: int = 0,
    ) -> Iterator[Token]:
        """Continue every prompt, token by token. Closing the iterator cancels the rest.

        prompts         texts, or lists of token ids
        max_new_tokens  at least 1, one number or one per prompt; also bounded by the model's positions
        sampling        one Sampling for all, where row i draws from random stream i, or one per prompt,
                        each drawing from stream 0, so that a row does not depend on its place in the batch
        mode, tenants, factors, adapters, conditioning
                        as in `adapt`; the factors of a row are made from its prompt and do not change
        prompt_lookup_num_tokens  for a single prompt on the CPU: up to this many tokens, at most 16, are drafted by
                        prompt lookup and read in one call, which is faster where the text repeats itself, and slower
                        elsewhere. The tokens are those of plain decoding in fp32; in int8 they can
                        differ, since a call of several tokens rounds differently. 0 is off

        Every argument is checked before this returns; see `adapt` for the errors.
        """
        return self._tokens(
            prompts,
            max_new_tokens,
            sampling,
            mode,
            tenants,
            factors,
            adapters,
            conditioning,
            prompt_lookup_num_tokens,
            "raise",
            is_shown=True,
        )

    def _tokens(
        self,
        prompts: Texts,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        mode: Mode | None,
        tenants: Sequence[Hashable] | None,
        factors: Factors | None,
        adapters: Sequence[str | None] | None,
        conditioning: npt.ArrayLike | None,
        prompt_lookup_num_tokens: int,
        errors: OnError,
        is_shown: bool,
    ) -> Iterator[Token]:
        rows, model = self.encode(prompts), self.manifest.model
        adaptation = self._adapt(rows, mode, tenants, factors, adapters, conditioning)
        active = begin_rows(rows, adaptation.cluster_ids, max_new_tokens, sampling, model, is_shown=is_shown)
        decode = partial(stream_speculated, draft_tokens=prompt_lookup_num_tokens)
        return (decode if integer("prompt_lookup_num_tokens", prompt_lookup_num_tokens) else stream_tokens)(
            active, decoder=self.decoder, factors=adaptation.factors, tokenizer=self.tokenizer,
            eos_token_id=model.eos_token_id, errors=errors,
        )  # fmt: skip

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Add an adapter from a file that `adapter` wrote for this base model.

        The file is read whole and checked; calls that run are not affected. Safe to call from any thread.

        Raises InputError for a name that cannot be used, AdapterError for a name that is taken or a file that is not an
        adapter of this bundle, TensorError for tensors that do not fit. Then nothing is loaded.
        """
        self.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; rows that use it keep its factors. Raises AdapterError for an unknown name."""
        self.adapters.unload(name)

    def check_unchanged(self) -> None:
        """Check that the bundle's files are those that were loaded, by size, modification time and inode.

        The weights are mapped from the file: changing it in place changes results, and truncating it ends the process.
        A service calls this from time to time and loads the bundle again if it fails. It takes microseconds.

        Raises BundleChangedError.
        """
        self.bundle.check_unchanged()

    def encode(self, texts: Texts) -> list[list[int]]:
        return encode(texts, self.tokenizer, self.manifest.model)

    def _adapt(
        self,
        rows: list[list[int]],
        mode: Mode | None,
        tenants: Sequence[Hashable] | None,
        factors: Factors | None,
        adapters: Sequence[str | None] | None,
        conditioning: npt.ArrayLike | None,
    ) -> Adaptation:
        mode = self.check_arguments(mode, tenants, factors, adapters, len(rows))
        size = self.manifest.adaptation.conditioning_size
        given = adapting.check_conditioning(mode, conditioning, size, len(rows))
        embeddings, cluster_ids = self.embed(rows)
        factor_ids = np.zeros(len(rows), np.int64)
        if mode == "none":
            sets = self._no_factors
        elif mode == "static" and adapters is not None:
            of_rows = self.adapters.of_rows(adapters)
            sets, factor_ids = self.backend.place(of_rows.sets), of_rows.factor_ids
        elif mode == "static":
            sets = self._static_factors(factors)
        elif mode == "centroid":
            present, factor_ids = np.unique(cluster_ids, return_inverse=True)
            sets = self._factors_of_centroids()[present]
        elif given is not None:
            vectors, factor_ids = adapting.distinct(given)
            sets = self._generate(vectors)
        else:
            vectors, factor_ids = adapting.conditioning(mode, embeddings, cluster_ids, tenants)
            sets = self._generate(vectors)
        return Adaptation(embeddings, cluster_ids, RowFactors(sets, factor_ids.astype(np.int64)))

    def check_arguments(
        self,
        mode: Mode | None,
        tenants: Sequence[Hashable] | None,
        factors: Factors | None,
        adapters: Sequence[str | None] | None,
        batch: int,
    ) -> Mode:
        """Return the mode of a call. Raises ModeError or InputError."""
        check_adapters(adapters, batch)
        if mode is None:
            mode = self.mode if adapters is None else "static"
        self._check_mode(mode)
        adapting.check_tenants(mode, tenants, batch)
        if factors is not None and mode != "static":
            raise ModeError(f"factors were passed in mode {mode!r}: pass mode='static' with them")
        if adapters is not None and (mode != "static" or factors is not None):
            raise ModeError("adapters go with mode 'static' and without factors: pass nothing else with them")
        return mode

    def embed(self, rows: Sequence[Sequence[int]]) -> tuple[FloatArray, IntArray]:
        """Return embeddings [batch, hidden] and cluster ids [batch]."""
        model, spec = self.manifest.model, self.manifest.adaptation
        embeddings = adapting.embed(rows, self._token_embedding, spec, model.eos_token_id)
        return embeddings, adapting.assign(embeddings, self._centroids)

    def factor_sources(
        self,
        mode: Mode,
        embeddings: FloatArray,
        cluster_ids: IntArray,
        tenants: Sequence[Hashable] | None,
        factors: Factors | None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[FactorSource]:
        """Return the source of each row's factors. Factors are made on demand, except those that a caller passed."""
        none = FactorSource("none", lambda: self._no_factors)
        if mode == "none":
            return [none] * len(embeddings)
        if adapters is not None:
            return [none if name is None else self._adapter_source(name) for name in adapters]
        if mode == "static":
            sets = self._static_factors(factors)
            own = sets[np.array([0])]  # a copy, which the caller cannot change
            return [FactorSource("static" if factors is None else object(), lambda: own)] * len(embeddings)
        if mode == "centroid":
            return [FactorSource(int(c), partial(self._factors_of_centroid, int(c))) for c in cluster_ids]
        vectors, factor_ids = adapting.conditioning(mode, embeddings, cluster_ids, tenants)
        # Equal vectors have equal factors, for any tenant.
        sources = [FactorSource(v.tobytes(), partial(self._generate, v[None])) for v in vectors]
        return [sources[i] for i in factor_ids]

    def _adapter_source(self, name: str) -> FactorSource:
        adapter = self.adapters[name]
        sets = self.adapters.sets_of(adapter)  # held, so that the row keeps it whatever is unloaded or leaves
        return FactorSource(adapter.key, lambda: sets)

    def _static_factors(self, factors: Factors | None) -> FactorSets:
        if factors is not None:
            return self._entered(check_factors(factors, self.manifest.adaptation))
        if self.adapters.names and factors is None:
            raise ModeError("mode 'static' of a bundle with adapters: pass adapters=, a name or None per text")
        if self._lora is None:
            names = ", ".join(self.manifest.adaptation.factor_widths)
            raise ModeError(f"mode 'static' needs factors={{{names}}}: this bundle has no trained LoRA")
        return self._lora

    def _generate(self, vectors: FloatArray) -> FactorSets:
        """Return the sets of conditioning vectors [factor_sets, size], where and as the decoder reads them."""
        sets = self.backend.generate_factors(vectors)
        return self._entered(sets) if self.manifest.has_basis else sets

    def _entered(self, sets: FactorSets) -> FactorSets:
        """Return sets of plain layers as the decoder reads them."""
        entered = self._enter({name: np.asarray(array, np.float32) for name, array in sets.tensors.items()})
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in entered.items()}
        return self.backend.place(FactorSets(arrays))

    def _factors_of_centroids(self) -> FactorSets:
        # Two threads may both compute it the first time; they get the same values.
        if self._centroid_factors is None:
            self._centroid_factors = self._generate(self._centroids)
        return self._centroid_factors

    def _factors_of_centroid(self, cluster_id: int) -> FactorSets:
        return self._factors_of_centroids()[np.array([cluster_id])]

    def _check_mode(self, mode: str) -> None:
        if not isinstance(mode, str) or mode not in get_args(Mode):
            raise ModeError(f"{mode!r:.40} is not a mode: choose one of {', '.join(get_args(Mode))}")
        available = self.manifest.adaptation.modes
        if mode not in available:
            raise ModeError(
                f"mode {mode!r} cannot be served by this bundle of regime {self.manifest.adaptation.regime!r} with "
                f"{self.manifest.adaptation.num_clusters} clusters: choose one of {', '.join(available)}"
            )
