"""The runtime: load a bundle, adapt a batch, score it, generate from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Unpack, cast, get_args

import numpy as np

from chameleon_deploy.contract.bundle import Bundle, FloatArray, IntArray, Mode, default_mode, start_opening
from chameleon_deploy.contract.manifest import CHAT_TEMPLATE
from chameleon_deploy.contract.provenance import TrustedKeys
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.adaptation import Adapt, Adaptation, AdaptKeywords
from chameleon_deploy.runtime.backend import Backend
from chameleon_deploy.runtime.chat.conversation import Messages
from chameleon_deploy.runtime.chat.template import ChatTemplate, chat_generate, chat_prompt, load_chat_template
from chameleon_deploy.runtime.encoder import Encoder
from chameleon_deploy.runtime.engine.loop import generate_rows
from chameleon_deploy.runtime.factor_sources import FactorSources
from chameleon_deploy.runtime.generation import (
    Generate,
    GenerateKeywords,
    Generation,
    OnError,
    Token,
    begin_rows,
)
from chameleon_deploy.runtime.inputs import Texts, check_names, check_threads, checked_path, chosen, encode
from chameleon_deploy.runtime.providers import check_provider, open_backend
from chameleon_deploy.runtime.sampling_settings import Sampling
from chameleon_deploy.runtime.scoring import Score, score_rows
from chameleon_deploy.runtime.structured_outputs import Grammars, StructuredOutputs, TokenMask
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
        return Runtime(bundle, open_backend(bundle, provider, threads, share_weights), mode, threads)
    finally:
        bundle.require_weights()  # damaged weights explain any other error, so report them first


class Runtime:
    """A loaded bundle. It has no state of a request: one runtime serves any number of threads.

    On a GPU the factors of score, generate and stream stay in its memory; `adapt` copies them to the host by default.

    bundle, backend, mode      as passed to the constructor
    sources, adapters          of factors, see FactorSources
    encoder                    of descriptions of tasks; None in a bundle without
    manifest, tokenizer        of the bundle
    provider, graph, decoder, integer_weights
                               of the backend
    """

    def __init__(self, bundle: Bundle, backend: Backend, mode: Mode | None = None, threads: int | None = None) -> None:
        """Run a bundle on a backend that was opened for it; `load` opens both.

        mode     adaptation mode of calls that name none; None takes "cohort", or "static" for a bundle of regime lora
        threads  of the encoder, which runs on the CPU

        Raises ManifestError for a tokenizer.json that does not load, ModeError for a mode that the bundle cannot serve.
        """
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest
        self.mode: Mode = default_mode(bundle.manifest.adaptation) if mode is None else mode
        self.tokenizer = load_tokenizer(bundle.path / "tokenizer.json")
        self.provider, self.graph, self.decoder = backend.provider, backend.graph, backend.decoder
        self.integer_weights = backend.integer_weights
        spec = bundle.manifest.encoder
        self.encoder = None if spec is None else Encoder(bundle, spec, threads)
        self.sources = FactorSources(bundle, backend, self.mode, self.encoder)
        self.adapters = self.sources.adapters

    def adapt(
        self, texts: Texts, adapt: Adapt | None = None, *, on_device: bool = False, **keywords: Unpack[AdaptKeywords]
    ) -> Adaptation:
        """Embed and cluster a batch and generate its factors.

        texts      texts, or lists of token ids
        adapt      how they are adapted, or the fields of Adapt as keywords
        on_device  leave the factors in the decoder's memory, which may be a GPU's; False copies them to the host

        Raises InputError, TokenError, LengthError, ModeError, FactorsError or AdapterError.
        """
        adaptation = self._adapt(self.encode(texts), adapt, keywords)
        if on_device:
            return adaptation
        row_factors = adaptation.factors
        return replace(adaptation, factors=replace(row_factors, sets=row_factors.sets.in_memory()))

    def score(self, texts: Texts, adapt: Adapt | None = None, **keywords: Unpack[AdaptKeywords]) -> list[Score]:
        """Return the log-probability of every token of every text, given the tokens before it. Arguments as in
        `adapt`.
        """
        rows = self.encode(texts)
        return score_rows(rows, self.decoder, self._adapt(rows, adapt, keywords))

    def _adapt(self, rows: list[list[int]], adapt: Adapt | None, keywords: AdaptKeywords) -> Adaptation:
        check_names(keywords, Adapt)
        return self.sources.adapt(rows, chosen(Adapt, adapt, keywords))

    def generate(
        self,
        prompts: Texts,
        generate: Generate | None = None,
        adapt: Adapt | None = None,
        *,
        errors: OnError = "raise",
        **keywords: Unpack[GenerateKeywords],
    ) -> list[Generation]:
        """Continue every prompt. Other arguments as in `stream`.

        errors  of one row, whose logits are not finite or whose tokens cannot be decoded: "raise" raises the first and
                ends the batch; "row" ends that row alone, with finish_reason "error" and its Generation.error
        """
        if not isinstance(errors, str) or errors not in get_args(OnError):
            raise InputError(f"errors must be one of {', '.join(get_args(OnError))}, got {errors!r:.40}", "errors")
        check_names(keywords, Generate, Adapt)
        options = chosen(Generate, generate, keywords), chosen(Adapt, adapt, keywords)
        tokens = self._tokens(prompts, *options, errors, is_shown=False)
        finished = {token.row: token.generation for token in tokens if token.generation is not None}
        return [finished[row] for row in range(len(finished))]

    def stream(
        self,
        prompts: Texts,
        generate: Generate | None = None,
        adapt: Adapt | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Iterator[Token]:
        """Continue every prompt, token by token. Closing the iterator cancels the rest.

        prompts   texts, or lists of token ids
        generate  how they are continued, or the fields of Generate as keywords
        adapt     how they are adapted, or the fields of Adapt as keywords; the factors of a row are made from its
                  prompt and do not change

        Every argument is checked before this returns; see `adapt` for the errors.
        """
        check_names(keywords, Generate, Adapt)
        return self._tokens(
            prompts, chosen(Generate, generate, keywords), chosen(Adapt, adapt, keywords), "raise", is_shown=True
        )

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The template of conversations.

        Raises InputError in a bundle without one, ManifestError for one that is not valid, DependencyError.
        """
        if CHAT_TEMPLATE not in self.manifest.files:
            message = f"{self.bundle.path} has no chat template: export it again with --chat-template FILE"
            raise InputError(message, "messages")
        return load_chat_template(self.bundle.path / CHAT_TEMPLATE, self.tokenizer)

    @cached_property
    def _grammars(self) -> Grammars:
        model = self.manifest.model
        return Grammars(self.tokenizer, model.vocab_size, model.eos_token_id)

    def has_compiled(self, outputs: StructuredOutputs) -> bool:
        """Return whether a call with these structured outputs takes no time to compile them."""
        return "_grammars" in self.__dict__ and outputs in self._grammars

    def new_mask(self, sampling: Sampling) -> TokenMask | None:
        """Return the state of a new row's structured outputs; None where its text is free.

        Raises InputError for structured outputs that cannot be compiled, DependencyError without llguidance.
        """
        outputs = cast(StructuredOutputs | None, sampling.structured_outputs)  # which converted its fields
        if outputs is None:
            return None
        return self._grammars.mask(outputs, sampling.stop_token_ids, sampling.ignore_eos)

    def chat(
        self,
        messages: Messages,
        generate: Generate | None = None,
        adapt: Adapt | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Generation:
        """Answer a conversation.

        messages  as in OpenAI's API, or a Conversation, which has tools and arguments of the template too
        generate  how the answer is generated, n = 1, or the fields of Generate as keywords; it has at most 1,024 tokens
                  unless they say otherwise, and ends where the template ends an assistant's turn
        adapt     how it is adapted, or the fields of Adapt as keywords

        Raises InputError for messages that make no sense, that the template refuses or that it is not made for, and the
        errors of `chat_template` and `stream`.
        """
        check_names(keywords, Generate, Adapt)
        generate = chat_generate(generate, keywords)
        if generate.n != 1:
            raise InputError("a chat has one answer: leave n out", "n")
        ids, generate = chat_prompt(self.chat_template, messages, generate)
        return self.generate([ids], generate, chosen(Adapt, adapt, keywords))[0]

    def _tokens(
        self, prompts: Texts, generate: Generate, adapt: Adapt, errors: OnError, is_shown: bool
    ) -> Iterator[Token]:
        rows, model = self.encode(prompts, "prompts"), self.manifest.model
        adaptation = self.sources.adapt(rows, adapt)
        active = begin_rows(rows, adaptation.cluster_ids, generate, model, self.new_mask, is_shown=is_shown)
        factors = adaptation.factors.rows(np.repeat(np.arange(len(rows)), generate.n))
        return generate_rows(active, factors, self.backend, self.tokenizer, model.eos_token_id, generate, errors)

    def load_adapter(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Add an adapter for this base model.

        path     a file that `adapter` wrote, a PEFT LoRA directory, which is converted once into the local cache, or
                 the URL of one of them, see `remote.fetch`
        replace  an adapter of a file under the same name: rows that use it keep its factors, later ones have the new

        The adapter is read whole and checked; calls that run are not affected. Safe to call from any thread.

        Raises InputError for a name or a URL that cannot be used, AdapterError for a name that is taken or a file that
        is not an adapter of this bundle, CheckpointError for a directory that is no plain LoRA, TensorError for tensors
        that do not fit, or the errors of downloads and of the local cache. Then nothing is loaded.
        """
        self.adapters.load(name, path, replace)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter of a file; rows that use it keep its factors.

        Raises AdapterError for an unknown name, and for an adapter of the bundle, which stays.
        """
        self.adapters.unload(name)

    def check_unchanged(self) -> None:
        """Check that the bundle's files are those that were loaded, by size, modification time and inode.

        The weights are mapped from the file: changing it in place changes results, and truncating it ends the process.
        A service calls this from time to time and loads the bundle again if it fails. It takes microseconds.

        Raises BundleChangedError.
        """
        self.bundle.check_unchanged()

    def embed(self, rows: Sequence[Sequence[int]]) -> tuple[FloatArray, IntArray]:
        """Return embeddings float32 [batch, hidden] and cluster ids int64 [batch] of token ids."""
        return self.sources.embed(rows)

    def encode(self, texts: Texts, argument: str = "texts", add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of texts, or the given ids, checked.

        argument            the caller's name of the texts, which errors carry
        add_special_tokens  to texts, those that tokenizer.json puts around them, as many models' `<bos>` before them

        Raises InputError, TokenError or LengthError.
        """
        return encode(texts, self.tokenizer, self.manifest.model, argument, add_special_tokens)
