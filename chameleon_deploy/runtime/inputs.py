"""Convert callers' arguments to lists of token ids, with every check in one place."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import ModelSpec
from chameleon_deploy.errors import ChameleonError, InputError, LengthError, TokenError
from chameleon_deploy.runtime.tokenizer import encode_batch

MAX_THREADS = 1024  # ONNX Runtime needs minutes to start a million
MAX_ROWS = 2**16  # of an engine, and continuations of a prompt

T = TypeVar("T")

Texts = Sequence[str] | Sequence[Sequence[int]] | Sequence[npt.NDArray[np.integer]]


def encode(
    texts: Texts, tokenizer: Any, model: ModelSpec, argument: str = "texts", add_special_tokens: bool = True
) -> list[list[int]]:
    """Return token ids of texts, or the passed ids after the same checks.

    argument            the caller's name of the texts, which errors carry
    add_special_tokens  to texts, those that tokenizer.json puts around them

    Raises InputError (nothing given, empty text, mixed kinds, not encodable), TokenError, LengthError.
    """
    try:
        return _encoded(texts, tokenizer, model, add_special_tokens)
    except ChameleonError as error:
        error.argument = argument
        raise


def _encoded(texts: Texts, tokenizer: Any, model: ModelSpec, add_special_tokens: bool) -> list[list[int]]:
    if not is_sequence(texts):
        raise InputError(f"expected a list of texts or of token id lists, got a single {type(texts).__name__}")
    if not len(texts):
        raise InputError("the batch is empty: pass at least one text")
    are_strings = [isinstance(text, str) for text in texts]
    if any(are_strings) != all(are_strings):
        raise InputError("the batch mixes texts and token id lists: pass one kind")
    if all(are_strings):
        rows = encode_batch(tokenizer, [str(text) for text in texts], add_special_tokens)
    else:
        rows = [_integers(row, ids) for row, ids in enumerate(texts)]
    for row, ids in enumerate(rows):
        _check_row(row, ids, model)
    return rows


def per_prompt(name: str, value: Any, batch: int) -> list[Any]:
    """Return one value per prompt, from one for all or one per prompt. Raises InputError for another number."""
    values = list(value) if is_sequence(value) else [value] * batch
    if len(values) != batch:
        raise InputError(f"{len(values)} values of {name} for {batch} prompts: pass one, or one per prompt", name)
    return values


def chosen(kind: type[T], given: T | None, keywords: Mapping[str, Any]) -> T:
    """Return the options of one kind, from an object or from those of the keywords that are its fields.

    Raises InputError for both at a time, or an object of another kind.
    """
    own = {name: value for name, value in keywords.items() if name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    if given is None:
        return kind(**own)
    if own:
        raise InputError(f"pass {kind.__name__}(...) or {', '.join(own)}, not both", next(iter(own)))
    if not isinstance(given, kind):
        raise InputError(f"expected a {kind.__name__}, got a {type(given).__name__}", kind.__name__.lower())
    return given


def check_names(keywords: Mapping[str, Any], *kinds: type) -> None:
    """Raise TypeError, as Python does, for a keyword that is no field of these options."""
    known = {name for kind in kinds for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    if unknown := [name for name in keywords if name not in known]:
        raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")


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
        raise InputError(
            f"threads must be from 1 to {MAX_THREADS}, got {count}: leave it out for one per core", "threads"
        )
    return count


def check_integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """Return an argument that must be an integer from `least` to `most`. Raises InputError."""
    number = integer(name, value)
    if not least <= number <= most:
        raise InputError(f"{name} must be an integer from {least} to {most}, got {number}", name)
    return number


def check_number(name: str, value: Any, least: float) -> float:
    """Return an argument that must be a number of at least `least`, which may be infinite. Raises InputError."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # of an integer
        number = math.nan
    if not number >= least:
        raise InputError(f"{name} must be a number of at least {least}, got {type(value).__name__} {value!r:.40}", name)
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
        raise InputError(f"{name} must be an integer, got {type(value).__name__} {value!r:.40}", name) from error


def _integers(row: int, ids: Any) -> list[int]:
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError) as error:  # nested lists of unequal lengths
        raise InputError(f"text {row} is neither a string nor a list of integers") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"text {row} is neither a string nor a list of integers")
    found: list[int] = array.tolist()
    return found


def _check_row(row: int, ids: list[int], model: ModelSpec) -> None:
    if not ids:
        raise InputError(f"text {row} is empty: every text needs at least one token")
    if min(ids) < 0 or max(ids) >= model.vocab_size:
        bad = next(i for i in ids if not 0 <= i < model.vocab_size)
        raise TokenError(f"text {row}: token id {bad} is outside the vocabulary of {model.vocab_size}")
    if len(ids) > model.max_positions:
        raise LengthError(f"text {row} has {len(ids)} tokens, the model has {model.max_positions} positions")
