"""The runtime: load a bundle, adapt a batch, score it, generate from it."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tokenizers import Tokenizer

from chameleon_deploy.bundle import Bundle, Mode, default_mode, opening_bundle
from chameleon_deploy.errors import InputError, ManifestError, ModeError
from chameleon_deploy.runtime import adaptation as adapting
from chameleon_deploy.runtime.adaptation import Adaptation, Factors
from chameleon_deploy.runtime.backend import Backend
from chameleon_deploy.runtime.generation import Generation, Row, Token, stream_tokens
from chameleon_deploy.runtime.inputs import Texts, encode
from chameleon_deploy.runtime.providers import check_provider, open_backend
from chameleon_deploy.runtime.sampling_settings import Sampling, check_sampling
from chameleon_deploy.runtime.scoring import Score, score_rows


def load(
    path: str | os.PathLike[str],
    provider: str = "cpu",
    mode: Mode | None = None,
    threads: int | None = None,
    share_weights: bool = False,
) -> Runtime:
    """Open a bundle and make it ready to run.

    path           the directory that export wrote
    provider       "cpu", "cuda", "tensorrt", or "auto" for the best of this machine, which `Runtime.provider` tells
    mode           adaptation mode where a call names none: by default "cohort", or "static" for a bundle of regime lora
    threads        of ONNX Runtime, within one operator; None lets it choose
    share_weights  on the CPU: map the weights, packed for this processor, from a file in the local cache, so that all
                   processes which load the bundle this way keep one copy. The first of them writes the file.

    Raises a ChameleonError: every file is checked before anything runs. A provider that cannot be had is a
    ProviderError or DependencyError that says what is missing.
    """
    check_provider(provider)
    with opening_bundle(Path(path)) as bundle:
        return Runtime(bundle, provider, mode, threads, share_weights=share_weights)


class Runtime:
    """A loaded bundle. It holds no state of a request: one runtime serves any number of threads.

    On a GPU the factors of score, generate and stream never leave it; `adapt` copies them to the host.

    bundle, provider, mode, graph, tokenizer, decoder   what it was loaded from and runs on
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str,
        mode: Mode | None = None,
        threads: int | None = None,
        graph: str | None = None,
        backend: Backend | None = None,
        share_weights: bool = False,
    ) -> None:
        """graph: which of the manifest's decoder graphs to run, where it is not to be the provider's own.

        backend: one that is open already, of this provider. share_weights: see `load`.
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.mode: Mode = mode or default_mode(bundle.manifest.adaptation)
        try:
            self.tokenizer: Any = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises Exception itself
            raise ManifestError(f"{bundle.path / 'tokenizer.json'}: {error}") from error
        self.provider = provider
        if backend is None:
            self.provider, backend = open_backend(bundle, provider, threads, graph, share_weights)
        self._backend, self.graph, self.decoder = backend, backend.graph, backend.decoder
        self._token_embedding = bundle.token_embedding()
        self._centroids = bundle.centroids()
        self._lora = backend.place(bundle.lora()) if self.manifest.adaptation.regime == "lora" else None
        # In mode none: the decoder takes a pair of factors in any case.
        shapes = (self.manifest.model.hidden_size, self.manifest.model.vocab_size)
        lora_A, lora_B = (np.zeros((1, 1, size), np.float32) for size in shapes)
        self._no_factors = backend.place((lora_A, lora_B))
        self._centroid_factors: Factors | None = None
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
    ) -> Adaptation:
        """Embed and cluster a batch and generate its factors.

        texts    texts, or lists of token ids
        mode     none, static, centroid, request, cohort or tenant; None takes the runtime's
        tenants  mode tenant: who each text belongs to, any hashable values
        factors  mode static: lora_A [rank, hidden] and lora_B [rank, vocab], alpha already in them

        Raises InputError, TokenError, LengthError, ModeError or FactorsError.
        """
        adaptation = self._adapt(self._encode(texts), mode, tenants, factors)
        lora_A, lora_B = (np.asarray(factor, np.float32) for factor in (adaptation.lora_A, adaptation.lora_B))
        return replace(adaptation, lora_A=lora_A, lora_B=lora_B)

    def score(
        self,
        texts: Texts,
        *,
        mode: Mode | None = None,
        tenants: Sequence[Hashable] | None = None,
        factors: Factors | None = None,
    ) -> list[Score]:
        """Log-probability of every token of every text, given the tokens before it. Arguments as in `adapt`."""
        rows = self._encode(texts)
        return score_rows(rows, self.decoder, self._adapt(rows, mode, tenants, factors))

    def generate(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int | Sequence[int] = 20,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (immutable)
        mode: Mode | None = None,
        tenants: Sequence[Hashable] | None = None,
        factors: Factors | None = None,
    ) -> list[Generation]:
        """Continue every prompt. Arguments as in `stream`."""
        finished: dict[int, Generation] = {}
        for token in self.stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, mode=mode, tenants=tenants, factors=factors
        ):
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
    ) -> Iterator[Token]:
        """Continue every prompt, token by token. Closing the iterator cancels what is left.

        prompts         texts, or lists of token ids
        max_new_tokens  at least 1, one number or one per prompt; the model's positions bound it too
        sampling        one Sampling for all, where row i draws from random stream i, or one per prompt,
                        each drawing from stream 0, so that a row does not depend on its place in the batch
        mode, tenants, factors  as in `adapt`; the factors of a row stay what its prompt made them

        Every argument is checked before this returns; see `adapt` for the errors.
        """
        rows = self._encode(prompts)
        limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        single = not isinstance(sampling, Sequence)
        samplings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(rows)
        for name, values in (("max_new_tokens", limits), ("sampling", samplings)):
            if len(values) != len(rows):
                raise InputError(f"{len(values)} values of {name} for {len(rows)} prompts: pass one, or one per prompt")
        if min(limits) < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {min(limits)}")
        for each in samplings:
            check_sampling(each, self.manifest.model.vocab_size)
        adaptation = self._adapt(rows, mode, tenants, factors)
        positions = self.manifest.model.max_positions
        active = [
            # The last new token is never fed back, so it needs no position.
            Row(ids, min(limits[i], positions - len(ids) + 1), samplings[i], i if single else 0, int(cluster_id))
            for i, (ids, cluster_id) in enumerate(zip(rows, adaptation.cluster_ids, strict=True))
        ]
        return stream_tokens(active, self.decoder, adaptation, self.tokenizer, self.manifest.model)

    def _encode(self, texts: Texts) -> list[list[int]]:
        return encode(texts, self.tokenizer, self.manifest.model)

    def _adapt(
        self,
        rows: list[list[int]],
        mode: Mode | None,
        tenants: Sequence[Hashable] | None,
        factors: Factors | None,
    ) -> Adaptation:
        mode = mode or self.mode
        self._check_mode(mode)
        adapting.check_tenants(mode, tenants, len(rows))
        if factors is not None and mode != "static":
            raise ModeError(f"factors were passed in mode {mode!r}: pass mode='static' with them")
        model, spec = self.manifest.model, self.manifest.adaptation
        embeddings = adapting.embed(rows, self._token_embedding, spec, model.eos_token_id)
        cluster_ids = adapting.assign(embeddings, self._centroids)
        factor_ids = np.zeros(len(rows), np.int64)
        if mode == "none":
            lora_A, lora_B = self._no_factors
        elif mode == "static":
            lora_A, lora_B = self._static_factors(factors)
        elif mode == "centroid":
            present, factor_ids = np.unique(cluster_ids, return_inverse=True)
            lora_A, lora_B = (stacked[present] for stacked in self._factors_of_centroids())
        else:
            vectors, factor_ids = adapting.conditioning(mode, embeddings, cluster_ids, tenants)
            lora_A, lora_B = self._generate_factors(vectors)
        return Adaptation(embeddings, cluster_ids, lora_A, lora_B, factor_ids.astype(np.int64))

    def _static_factors(self, factors: Factors | None) -> Factors:
        if factors is not None:
            return self._backend.place(adapting.check_factors(factors, self.manifest.model))
        if self._lora is None:
            raise ModeError("mode 'static' needs factors=(lora_A, lora_B): this bundle has no trained LoRA of its own")
        return self._lora

    def _factors_of_centroids(self) -> Factors:
        # Two threads may both compute it the first time; they get the same values.
        if self._centroid_factors is None:
            self._centroid_factors = self._generate_factors(self._centroids)
        return self._centroid_factors

    def _generate_factors(self, conditioning: Any) -> Factors:
        """conditioning [clusters, hidden] -> lora_A [clusters, rank, hidden], lora_B [clusters, rank, vocab]"""
        return self._backend.generate_factors(conditioning)

    def _check_mode(self, mode: str) -> None:
        if mode not in get_args(Mode):
            raise ModeError(f"{mode!r} is not a mode: choose one of {', '.join(get_args(Mode))}")
        available = self.manifest.adaptation.modes
        if mode not in available:
            raise ModeError(
                f"mode {mode!r} cannot be served by this bundle of regime {self.manifest.adaptation.regime!r} with "
                f"{self.manifest.adaptation.num_clusters} clusters: choose one of {', '.join(available)}"
            )
