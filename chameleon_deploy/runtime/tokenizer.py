"""The tokenizer of a bundle. A text's token ids must depend on that text only, and represent all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from chameleon_deploy.errors import ChameleonError, InputError, ManifestError, RequestError
from chameleon_deploy.runtime.tokenizer_file import file_fault

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what stands for bytes that are no text, or part of a character
MAX_PENDING = 16  # tokens that are waited for until they complete a character, which has at most 4 bytes
MAX_INCOMPLETE = 3  # bytes of a character without its last


def load_tokenizer(file: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a bundle's tokenizer.json, of the parts that both runtimes have.

    Raises ManifestError for a file that `tokenizers` does not read, for one that pads, truncates or has dropout
    (padding makes a text's ids depend on other rows, dropout makes them random), and for any part or pattern that
    `tokenizer_file` does not list.
    """
    try:
        fault = file_fault(msgspec.json.decode(file.read_bytes()))
        tokenizer = None if fault else Tokenizer.from_file(str(file))
    except BaseException as error:  # tokenizers raises Exception itself; RecursionError, for nested lists, is one too
        raise _as(ManifestError, error, f"{file}") from error
    if fault:
        raise ManifestError(f"{file}: {fault}")
    return tokenizer


def encode_batch(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Return the token ids of texts.

    add_special_tokens  with those that tokenizer.json puts around a text, as many models' `<bos>` before it

    Raises InputError for a text that is no Unicode, or that `tokenizers` gives up: Oniguruma bounds its work.
    """
    try:
        found = tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]
    except (TypeError, UnicodeEncodeError) as error:
        row = next(i for i, text in enumerate(texts) if not _is_unicode(text))
        raise InputError(f"text {row} holds a lone surrogate and is not valid Unicode") from error
    except BaseException as error:
        raise _as(InputError, error, "the texts cannot be split into words") from error


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return the text of token ids without special tokens. Raises RequestError if `tokenizers` fails or panics."""
    return _decode(tokenizer, token_ids, True)


class DecodeStream:
    """The text of one row, token by token: a character is shown when all of its tokens are there.

    As `tokenizers.decoders.DecodeStream`, with two differences. Where later tokens change text that was shown (an
    invalid byte after a valid one, in byte fallback), what was shown stays, and the text goes on behind it. After
    MAX_PENDING tokens without text, what there is is shown, but for the bytes at its end that others may complete, so
    that a step takes bounded time.
    """

    def __init__(self, skip_special_tokens: bool = True) -> None:
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []  # the last tokens that were shown, and those that were not
        self._num_shown = 0  # how many of them were shown
        self._shown = 0  # characters of the text of those, when they stand alone

    def step(self, tokenizer: Any, token_id: int) -> str:
        """Return the text that one more token completes. Raises RequestError as `decode` does."""
        self._ids.append(token_id)
        text = _decode(tokenizer, self._ids, self._skip_special_tokens)
        is_complete = len(text) > self._shown and not text.endswith(REPLACEMENT)
        if not is_complete and len(self._ids) - self._num_shown < MAX_PENDING:
            return ""
        new = text[self._shown : _settled(text)]
        self._ids = self._ids[self._num_shown :]  # tokens are decoded after those before them
        self._num_shown = len(self._ids)
        self._shown = _settled(_decode(tokenizer, self._ids, self._skip_special_tokens))
        return new


def _settled(text: str) -> int:
    """Return how many characters of a text no later token changes: not those that may be bytes of its last one."""
    return len(text) - min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_INCOMPLETE)


def _decode(tokenizer: Any, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    try:
        return str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
    except BaseException as error:
        raise _as(RequestError, error, "the tokenizer cannot decode this row") from error


def _as(kind: type[ChameleonError], error: BaseException, doing: str) -> ChameleonError:
    """Return an error or a panic, which is no Exception, as one of ours. Errors that end the process pass."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error
    return kind(f"{doing}: {error}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
