"""Convert callers' arguments to lists of token ids, with every check in one place."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import ModelSpec
from chameleon_deploy.errors import InputError, LengthError, TokenError

MAX_THREADS = 1024  # ONNX Runtime needs minutes to start a million
MAX_ROWS = 2**16  # of an engine, and continuations of a prompt

Texts = Sequence[str] | Sequence[Sequence[int]] | Sequence[npt.NDArray[np.integer]]


def encode(texts: Texts, tokenizer: Any, model: ModelSpec) -> list[list[int]]:
    """Return token ids of texts, or the passed ids after the same checks.

    Raises InputError (nothing given, empty text, mixed kinds, not encodable), TokenError, LengthError.
    """
    if not is_sequence(texts):
        raise InputError(f"expected a list of texts or of token id lists, got a single {type(texts).__name__}")
    if not len(texts):
        raise InputError("the batch is empty: pass at least one text")
    are_strings = [isinstance(text, str) for text in texts]
    if any(are_strings) != all(are_strings):
        raise InputError("the batch mixes texts and token id lists: pass one kind")
    if all(are_strings):
        try:
            rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError) as error:
            row = next(i for i, text in enumerate(texts) if not _is_unicode(str(text)))
            raise InputError(f"text {row} holds a lone surrogate and is not valid Unicode") from error
    else:
        rows = [_integers(row, ids) for row, ids in enumerate(texts)]
    for row, ids in enumerate(rows):
        _check_row(row, ids, model)
    return rows


def token_limits(max_new_tokens: int | Sequence[int], batch: int) -> list[int]:
    """Return each row's limit of new tokens, from one number or one per row. Raises InputError."""
    if is_sequence(max_new_tokens):
        limits = [integer("max_new_tokens", value) for value in max_new_tokens]
    else:
        limits = [integer("max_new_tokens", max_new_tokens)] * batch
    if len(limits) != batch:
        raise InputError(f"{len(limits)} values of max_new_tokens for {batch} prompts: pass one, or one per prompt")
    if min(limits) < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {min(limits)}")
    return limits


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a bundle. Raises InputError for another type."""
    try:
        return Path(path)
    except TypeError as error:
        raise InputError(f"a path must be a string or a pathlib.Path, got {type(path).__name__}") from error


def check_threads(threads: int | None) -> int | None:
    """Return the number of threads of one operator; None lets ONNX Runtime choose. Raises InputError."""
    if threads is None:
        return None
    count = integer("threads", threads)
    if not 1 <= count <= MAX_THREADS:
        raise InputError(f"threads must be from 1 to {MAX_THREADS}, got {count}: leave it out for one per core")
    return count


def check_integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """Return an argument that must be an integer from `least` to `most`. Raises InputError."""
    number = integer(name, value)
    if not least <= number <= most:
        raise InputError(f"{name} must be an integer from {least} to {most}, got {number}")
    return number


def check_number(name: str, value: Any, least: float) -> float:
    """Return an argument that must be a number of at least `least`, which may be infinite. Raises InputError."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # of an integer
        number = math.nan
    if not number >= least:
        raise InputError(f"{name} must be a number of at least {least}, got {type(value).__name__} {value!r:.40}")
    return number


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether an argument holds several values: a list, a tuple or an array, but no text."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def integer(name: str, value: Any) -> int:
    """Return an integer argument. Raises InputError for another type."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} must be an integer, got {type(value).__name__} {value!r:.40}") from error


def _integers(row: int, ids: Any) -> list[int]:
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError) as error:  # nested lists of unequal lengths
        raise InputError(f"text {row} is neither a string nor a list of integers") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"text {row} is neither a string nor a list of integers")
    return [int(i) for i in array]


def _check_row(row: int, ids: list[int], model: ModelSpec) -> None:
    if not ids:
        raise InputError(f"text {row} is empty: every text needs at least one token")
    if min(ids) < 0 or max(ids) >= model.vocab_size:
        bad = next(i for i in ids if not 0 <= i < model.vocab_size)
        raise TokenError(f"text {row}: token id {bad} is outside the vocabulary of {model.vocab_size}")
    if len(ids) > model.max_positions:
        raise LengthError(f"text {row} has {len(ids)} tokens, the model has {model.max_positions} positions")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
