"""The settings of sampling, checked and immutable; runtime/sampling.py specifies their effect."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import InputError, TokenError
from chameleon_deploy.runtime.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
# What is looked at for every token is bounded, so that no request slows the steps that it shares with others.
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 1024
MAX_STOP_TOKEN_IDS = MAX_BIASES = 1024
_FLOAT32 = np.finfo(np.float32)
_FLOAT64_MAX = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Sampling:
    """The settings by which the tokens of a row are chosen, and when it stops.

    temperature         0 is greedy, else at least 1e-5
    top_k               0 keeps all
    top_p               1 keeps all
    repetition_penalty  1 changes nothing; counts the prompt and the generated tokens
    seed                0 <= seed < 2**64; equal seeds give equal tokens
    stop_token_ids      stop after one of these, at most 1,024, in addition to the model's end of text
    stop                stop before one of these strings: at most 16, of at most 1,024 characters each
    presence_penalty    -2 to 2, subtracted from the logit of every generated token
    frequency_penalty   -2 to 2, subtracted as often as the token was generated
    logit_bias          token id -> -100 to 100, added to its logit; of at most 1,024 tokens. Kept as a tuple of pairs
                        in the order of the ids
    ignore_eos          do not stop at the model's end of text; with structured_outputs, only where nothing else can
                        follow
    logprobs            report the log-probability of every token, and of 0 to 20 alternatives; None reports none
    structured_outputs  what the text must be, a StructuredOutputs or a mapping of its fields; None leaves it free

    Raises InputError for a value of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, (convert, expected) in _FIELDS.items():
            value = getattr(self, name)
            try:
                converted = convert(value)
            except (TypeError, ValueError, OverflowError):
                raise InputError(f"{name}={value!r:.80}: pass {expected}", name) from None
            object.__setattr__(self, name, converted)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The stop_token_ids, to look one up in."""
        return frozenset(self.stop_token_ids)

    @cached_property
    def biases(self) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """The token ids of logit_bias, ascending, and what is added to the logit of each.  -> int64 [n], float32 [n]"""
        pairs = dict(self.logit_bias)
        return np.fromiter(pairs, np.int64, len(pairs)), np.fromiter(pairs.values(), np.float32, len(pairs))


def _real(lowest: float, highest: float) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError
        return float(_within(float(value), lowest, highest))

    return convert


def _integer(lowest: int, highest: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError
        return int(_within(operator.index(value), lowest, highest))

    return convert


def _within(value: float, lowest: float, highest: float) -> float:
    if not lowest <= value <= highest:  # false for NaN
        raise ValueError
    return value


def _temperature(value: Any) -> float:
    number = _real(0, _FLOAT64_MAX)(value)
    return 0.0 if number == 0 else _within(number, 1e-5, _FLOAT64_MAX)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _structured_outputs(value: Any) -> StructuredOutputs | None:
    return value if value is None or isinstance(value, StructuredOutputs) else StructuredOutputs(**value)


def _stop(value: Any) -> tuple[str, ...]:
    strings = tuple(value)
    if isinstance(value, str) or not all(isinstance(string, str) for string in strings):
        raise TypeError
    _within(len(strings), 0, MAX_STOP_STRINGS)
    for string in strings:
        _within(len(string), 1, MAX_STOP_CHARACTERS)
    return strings


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    token_ids = tuple(_token_id(token_id) for token_id in value)
    _within(len(token_ids), 0, MAX_STOP_TOKEN_IDS)
    return token_ids


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    biases = dict(value)
    _within(len(biases), 0, MAX_BIASES)
    return tuple(sorted((_token_id(token_id), _bias(bias)) for token_id, bias in biases.items()))


_token_id = _integer(0, 2**63 - 1)
_bias = _real(-100, 100)
_penalty = (_real(-2, 2), "a number from -2 to 2 (0 changes nothing)")
_FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "temperature": (_temperature, "0, which is greedy, or a finite number of at least 1e-5"),
    "top_k": (_integer(0, 2**63 - 1), "an integer of at least 0 (0 keeps all)"),
    "top_p": (_real(5e-324, 1), "a number above 0, at most 1 (1 keeps all)"),
    "repetition_penalty": (
        _real(float(_FLOAT32.smallest_normal), float(_FLOAT32.max)),
        "a positive number in float32's range (1 changes nothing)",
    ),
    "seed": (_integer(0, 2**64 - 1), "an integer from 0 to 2**64 - 1"),
    "stop_token_ids": (_stop_token_ids, f"at most {MAX_STOP_TOKEN_IDS} token ids"),
    "stop": (_stop, f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters"),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "logit_bias": (_logit_bias, f"numbers from -100 to 100 by token id, of at most {MAX_BIASES} tokens"),
    "ignore_eos": (_flag, "True or False"),
    "logprobs": (
        lambda value: None if value is None else _integer(0, MAX_LOGPROBS)(value),
        f"None, or an integer from 0 to {MAX_LOGPROBS}",
    ),
    "structured_outputs": (_structured_outputs, "a chameleon_deploy.StructuredOutputs, or its fields"),
}


def check_sampling(sampling: Any, vocab_size: int) -> None:
    """Check the settings that depend on the model.

    Raises InputError for another type than Sampling, and TokenError for a bias of a token outside the vocabulary.
    """
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling is of type {type(sampling).__name__}: pass a chameleon_deploy.Sampling", "sampling")
    biased, _ = sampling.biases
    if len(biased) and biased[-1] >= vocab_size:
        raise TokenError(f"logit_bias: token id {biased[-1]} is outside the vocabulary of {vocab_size}", "logit_bias")
