"""The requests to send: prompts and lengths, from a file or from a seed, and their times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from chameleon_deploy.errors import InputError


class Request(msgspec.Struct, frozen=True):
    """One request for one completion.

    prompt      a text, or token ids
    max_tokens  new tokens that are asked for
    model       model name of a server, or adaptation mode of a bundle; None takes the default
    """

    prompt: str | list[int]
    max_tokens: int
    model: str | None = None


def read_requests(path: Path, count: int, models: Sequence[str | None]) -> list[Request]:
    """Return the requests of a JSONL file, repeated if it has fewer than `count`.

    A line is {"prompt": text or token ids, "max_tokens": number, "model": optional name}. Lines without a name get
    `models` in turn.

    Raises InputError.
    """
    decoder = msgspec.json.Decoder(Request)
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not found:
        raise InputError(f"{path} holds no request")
    taken = [found[i % len(found)] for i in range(count)]
    return [
        request if request.model else msgspec.structs.replace(request, model=models[i % len(models)])
        for i, request in enumerate(taken)
    ]


def random_requests(
    seed: int,
    count: int,
    prompt_tokens: tuple[int, int],
    new_tokens: tuple[int, int],
    vocab_size: int,
    models: Sequence[str | None] = (None,),
) -> list[Request]:
    """Return prompts of random token ids below vocab_size; both lengths are uniform between two bounds, inclusive."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(0, vocab_size, rng.integers(*prompt_tokens, endpoint=True)).tolist(),
            int(rng.integers(*new_tokens, endpoint=True)),
            models[i % len(models)],
        )
        for i in range(count)
    ]


def poisson_arrivals(seed: int, count: int, rate: float) -> list[float]:
    """Return the arrival times in seconds, from 0, of a Poisson process of `rate` requests per second."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    gaps[0] = 0.0
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def parse_range(text: str) -> tuple[int, int]:
    """Parse `128` or `16:256` into the least and the greatest length.

    Raises InputError.
    """
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise InputError(f"{text!r} is not a length: pass a number, or two as in 16:256") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise InputError(f"{text!r}: pass lengths of at least 1, the lower one first")
    return bounds
