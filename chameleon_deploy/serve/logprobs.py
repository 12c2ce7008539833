"""The logprobs object of a choice, and what a token is called in it: its text, where no other token has the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from chameleon_deploy.runtime.sampling import Choice
from chameleon_deploy.runtime.tokenizer import DecodeStream
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
            self.offset += len(self._decode.step(self._tokenizer, choice.token_id))
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


class TokenNames:
    """A name for every token id, no two the same.

    A token that is part of a character is named by its bytes, and tokens of equal text by their ids.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        text_of = _byte_level_text if "ByteLevel" in repr(tokenizer.decoder) else _sentencepiece_text
        tokens = map(tokenizer.id_to_token, range(vocab_size))  # None for an id that the tokenizer does not know
        names = [None if token is None else text_of(token) for token in tokens]
        times = Counter(names)
        self._names = [
            by_id(token_id) if name is None or times[name] > 1 else name for token_id, name in enumerate(names)
        ]

    def __getitem__(self, token_id: int) -> str:
        return self._names[token_id]


def by_id(token_id: int) -> str:
    return f"token_id:{token_id}"


def _sentencepiece_text(token: str) -> str:
    return token.replace("\u2581", " ")


def _byte_level_text(token: str) -> str:
    if not all(character in _BYTES for character in token):  # a special token
        return token
    raw = bytes(_BYTES[character] for character in token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with (Radford et al., 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
