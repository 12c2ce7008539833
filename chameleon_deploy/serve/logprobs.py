"""The logprobs object of a choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tokenizers.decoders import DecodeStream

from chameleon_deploy.runtime.sampling import Choice
from chameleon_deploy.serve.schemas import Logprobs

LOWEST = -9999.0  # JSON has no minus infinity


class LogprobsWriter:
    """Writes the tokens of one row, in as many parts as a stream needs.

    offset  characters before the next token
    """

    def __init__(self, tokenizer: Any, name: Callable[[int], str], offset: int = 0, special: bool = False) -> None:
        """special: whether special tokens are part of the text"""
        self._tokenizer, self._name, self.offset = tokenizer, name, offset
        self._decode = DecodeStream(skip_special_tokens=not special)

    def write(self, choices: Iterable[Choice]) -> Logprobs:
        """A choice without log-probability is the first token of a prompt."""
        logprobs = Logprobs([], [], [], [])
        for choice in choices:
            logprobs.tokens.append(self._name(choice.token_id))
            logprobs.token_logprobs.append(None if choice.logprob is None else max(choice.logprob, LOWEST))
            logprobs.top_logprobs.append(None if choice.logprob is None else self._top(choice))
            logprobs.text_offset.append(self.offset)
            self.offset += len(self._decode.step(self._tokenizer, choice.token_id) or "")
        return logprobs

    def _top(self, choice: Choice) -> dict[str, float]:
        """The alternatives, and the token itself where it is none of them."""
        known = [*(choice.top_logprobs or ()), (choice.token_id, choice.logprob or 0.0)]
        return {self._name(token_id): max(logprob, LOWEST) for token_id, logprob in known}


def join(first: Logprobs, second: Logprobs) -> Logprobs:
    return Logprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        first.top_logprobs + second.top_logprobs,
        first.text_offset + second.text_offset,
    )
