"""Speculative decoding of a single row, whose draft is what followed the row's last tokens before (prompt lookup).

A step that reads several tokens costs little more than a step of one while it is bound by reading the weights. So the
model reads its last token and a draft in one call, and the draft's tokens that it would have chosen itself are kept:
the result is that of plain decoding, with the same random numbers, up to the rounding of a call of
several tokens.

Speculative decoding: Leviathan, Kalman, Matias, arXiv 2211.17192. Prompt lookup: Saxena 2023; transformers has it as
`prompt_lookup_num_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.errors import InputError, ProviderError
from chameleon_deploy.runtime.decoder import Decoder
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.generation import OnError, Row, Token, append_choice, choosers
from chameleon_deploy.runtime.logits import HostLogits
from chameleon_deploy.runtime.shared_cache import SharedCacheDecoder

MATCHED_TOKENS = (3, 2)  # lengths of the suffix that is looked up, the longest first


class PromptLookup:
    """The tokens of a row, and where each of their n-grams occurred last."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after it
        for token_id in token_ids:
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


def stream_speculated(
    rows: Sequence[Row],
    draft_tokens: int,
    decoder: Decoder,
    factors: RowFactors,
    tokenizer: Any,
    eos_token_id: int,
    errors: OnError = "raise",
) -> Iterator[Token]:
    """Stream the tokens of one row. Arguments as in `stream_tokens`.

    draft_tokens  how many tokens to draft for a call, at most

    Raises InputError for another number of rows, ProviderError for a decoder that reads no draft.
    """
    name = "prompt_lookup_num_tokens"
    if len(rows) > 1:
        raise InputError(f"{name} is for a single prompt, got {len(rows)}: pass one, or leave it out", name)
    if not isinstance(decoder, SharedCacheDecoder):
        raise ProviderError(f"{name} works on provider 'cpu' only: leave it out", name)
    return _stream(rows[0], draft_tokens, decoder, factors, tokenizer, eos_token_id, errors)


def _stream(
    row: Row,
    draft_tokens: int,
    decoder: SharedCacheDecoder,
    factors: RowFactors,
    tokenizer: Any,
    eos_token_id: int,
    errors: OnError,
) -> Iterator[Token]:
    lookup = PromptLookup(row.prompt)
    logits, cache = decoder.prefill([row.prompt], factors, len(row.prompt) + row.limit - 1)
    draft: list[int] = []
    while True:
        values = np.asarray(logits)
        for i in range(len(draft) + 1):
            (choose,) = choosers([row.sampler], HostLogits(values[i : i + 1]))
            token = append_choice(row, choose, tokenizer, eos_token_id, errors)
            yield token
            if token.generation is not None:
                return
            lookup.append(token.token_id)
            if i < len(draft) and token.token_id != draft[i]:
                break
        # The last new token is never read, so a draft ends before it.
        draft = lookup.draft(min(draft_tokens, row.limit - len(row.token_ids) - 1))
        past = len(row.prompt) + len(row.token_ids) - 1  # a rejected draft is overwritten
        logits = decoder.extend([row.token_ids[-1], *draft], past, factors, cache)
