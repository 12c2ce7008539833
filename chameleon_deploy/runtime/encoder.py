"""The sentence encoder of a bundle: texts to embeddings, and descriptions of tasks to conditioning vectors.

Each text is a call of its own, so that its embedding depends on no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import msgspec
import numpy as np

from chameleon_deploy.contract.bundle import Bundle, FloatArray
from chameleon_deploy.contract.manifest import ENCODER_TOKENIZER, EncoderSpec
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.decode.session import open_session, run
from chameleon_deploy.runtime.inputs import Texts, encode
from chameleon_deploy.runtime.tokenizer import load_tokenizer

MAX_REMEMBERED = 256  # descriptions: requests repeat theirs


class Encoder:
    """An opened encoder, for any number of threads.

    spec  of the manifest
    """

    def __init__(self, bundle: Bundle, spec: EncoderSpec, threads: int | None = None) -> None:
        """Raises ManifestError for a tokenizer that does not load, GraphError for a graph that does not."""
        self.spec = spec
        session = open_session(bundle, bundle.manifest.graphs[bundle.graph("encoder", "cpu")], threads)
        tokenizer = load_tokenizer(bundle.path / ENCODER_TOKENIZER)
        room = spec.max_tokens - len(spec.prefix_ids) - len(spec.suffix_ids)
        limits = msgspec.structs.replace(
            bundle.manifest.model, vocab_size=spec.vocab_size, max_positions=room
        )  # what the text's own tokens must keep to
        self._encode: Callable[..., list[list[int]]] = partial(encode, tokenizer=tokenizer, model=limits)
        self._embed = partial(_embedding, session, spec)
        # Of the row alone: a method would keep this object in a cycle of references.
        self._vector = lru_cache(MAX_REMEMBERED)(partial(_conditioning, session, spec))

    def encode(self, texts: Texts, argument: str = "texts") -> list[list[int]]:
        """Return the token ids of texts, or the passed ids after the same checks, without special tokens.

        Raises InputError, TokenError or LengthError: no text is cut.
        """
        return self._encode(texts, argument=argument)

    def embed(self, rows: Sequence[Sequence[int]]) -> FloatArray:
        """Return the embeddings of token ids from `encode`.  -> float32 [rows, size]"""
        return np.stack([self._embed(tuple(row)) for row in rows])

    def conditioning(self, descriptions: Sequence[str]) -> FloatArray:
        """Return what the hypernetwork reads for descriptions of tasks.  -> float32 [descriptions, size]

        Raises InputError, TokenError or LengthError with the argument adapt_text.
        """
        if not all(isinstance(description, str) for description in descriptions):
            raise InputError("adapt_text is a description, or a list of one per text", "adapt_text")
        texts = [_with_stop(text) if self.spec.full_stop else text for text in descriptions]
        return np.stack([self._vector(tuple(row)) for row in self.encode(texts, "adapt_text")])


def _embedding(session: Any, spec: EncoderSpec, row: tuple[int, ...]) -> FloatArray:
    ids = np.array([[*spec.prefix_ids, *row, *spec.suffix_ids]], np.int64)
    embedding: FloatArray = run(session.run, ["embeddings"], {"input_ids": ids})[0][0]
    return embedding


def _conditioning(session: Any, spec: EncoderSpec, row: tuple[int, ...]) -> FloatArray:
    embedding = _embedding(session, spec, row)
    if not spec.conditioning_norm:
        return embedding
    exact = embedding.astype(np.float64)
    length = max(float(np.sqrt((exact * exact).sum())), 1e-12)
    scaled: FloatArray = (exact / length * spec.conditioning_norm).astype(np.float32)
    return scaled


def _with_stop(description: str) -> str:
    """Return a description that ends as those did which the network was trained on: a letter gets a full stop."""
    stripped = description.strip()
    return f"{stripped}." if stripped[-1:].isalpha() else stripped
