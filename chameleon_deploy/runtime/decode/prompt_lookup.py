"""Drafts for speculative decoding: what followed a row's last tokens before (prompt lookup).

A call that reads several tokens costs little more than a step of one while it is bound by reading the weights: while
one row is generated. So the decoder reads that row's last token and a draft in one call, and the draft's tokens that
would have been chosen anyway are kept: the result is that of plain decoding, with the same random numbers.

Speculative decoding: Leviathan, Kalman, Matias, arXiv 2211.17192. Prompt lookup: Saxena 2023; transformers has it as
`prompt_lookup_num_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_deploy.errors import InputError, ProviderError
from chameleon_deploy.runtime.decode.decoder import StaticDecoder
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder

MATCHED_TOKENS = (3, 2)  # lengths of the suffix that is looked up, the longest first


class PromptLookup:
    """The tokens of a row, and where each of their n-grams occurred last."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after it
        self._prompt = len(token_ids)
        for token_id in token_ids:
            self.append(token_id)

    def extend(self, generated: Sequence[int]) -> None:
        """Append those of the generated tokens that are not here yet."""
        for token_id in generated[len(self._ids) - self._prompt :]:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        # The n-grams that end at the previous token now have a token that follows them.
        for length in MATCHED_TOKENS:
            if len(self._ids) >= length:
                self._follows[tuple(self._ids[-length:])] = len(self._ids)
        self._ids.append(token_id)

    def draft(self, limit: int) -> list[int]:
        """Return up to `limit` tokens that followed the last tokens where they occurred before."""
        for length in MATCHED_TOKENS:
            start = self._follows.get(tuple(self._ids[-length:]))
            if start is not None and len(self._ids) >= length:
                return self._ids[start : start + limit]
        return []


def check_drafts(draft_tokens: int, decoder: SharedCacheDecoder | StaticDecoder) -> None:
    """Raise ProviderError or InputError if drafts are asked for of a decoder that would read them to other tokens."""
    name = "prompt_lookup_num_tokens"
    if not draft_tokens:
        return
    if not isinstance(decoder, SharedCacheDecoder):
        raise ProviderError(f"{name} works on provider 'cpu' only: leave it out", name)
    if not decoder.is_exact:
        message = "in int8 a call of several tokens rounds otherwise than calls of one, so tokens would differ"
        raise InputError(f"{name}: {message}: leave it out", name)
