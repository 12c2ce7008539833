"""Generating text: sample, stop, drop finished rows, decode one step, again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tokenizers.decoders import DecodeStream

from chameleon_deploy.bundle import FloatArray, ModelSpec
from chameleon_deploy.errors import ChameleonError, InputError
from chameleon_deploy.runtime.adaptation import Adaptation, IntArray
from chameleon_deploy.runtime.decoder import Decoder
from chameleon_deploy.runtime.device.logits import DeviceLogits
from chameleon_deploy.runtime.sampling import Sampling, choose, uniform

# Those after the first two come from an Engine alone.
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True)
class Generation:
    """token_ids are the new ones, a stop token included; text leaves out the stop token or stop string.

    error  what ended the row, where finish_reason is "error"
    """

    token_ids: list[int]
    text: str
    cluster_id: int
    finish_reason: FinishReason
    error: ChameleonError | None = None


@dataclass(frozen=True)
class Token:
    """One step of one row: text is what can be shown now, and may be empty or hold several tokens' characters.

    generation is set on a row's last Token. token_id is -1 where the row ended without a new token.
    """

    row: int
    token_id: int
    text: str
    generation: Generation | None


class Row:
    """A row while it is being generated."""

    def __init__(self, ids: Sequence[int], limit: int, sampling: Sampling, stream: int, cluster_id: int) -> None:
        self.prompt, self.limit, self.sampling, self.stream, self.cluster_id = ids, limit, sampling, stream, cluster_id
        self.token_ids: list[int] = []
        self._seen = np.unique(np.asarray(ids, np.int64))
        self._decode = DecodeStream(skip_special_tokens=True)
        self._text = ""
        self._shown = 0  # characters of the text that the caller has been given

    @property
    def is_greedy(self) -> bool:
        """Whether the highest of the logits as they are is what `choose` takes."""
        return self.sampling.temperature == 0.0 and self.sampling.repetition_penalty == 1.0

    def choose(self, logits: FloatArray) -> int:
        u = uniform(self.sampling.seed, self.stream, len(self.token_ids))
        token_id = choose(logits, self._seen, self.sampling, u)
        if self.sampling.repetition_penalty != 1.0:
            self._seen = np.union1d(self._seen, [token_id])
        return token_id

    def append(self, token_id: int, row: int, tokenizer: Any, eos_token_id: int) -> Token:
        self.token_ids.append(token_id)
        stopped = token_id == eos_token_id or token_id in self.sampling.stop_token_ids
        if stopped:
            self._text = self._decoded(tokenizer, self.token_ids[:-1])
        else:
            self._text += self._decode.step(tokenizer, token_id) or ""
            cut = min((at for stop in self.sampling.stop if (at := self._text.find(stop)) >= 0), default=-1)
            if cut >= 0:
                stopped, self._text = True, self._text[:cut]
        finished = stopped or len(self.token_ids) >= self.limit
        if finished and not stopped:
            self._text = self._decoded(tokenizer, self.token_ids)  # with the bytes of a character cut in half
        shown = self._text[self._shown : len(self._text) - (0 if finished else self._held_back())]
        self._shown += len(shown)
        reason: FinishReason = "stop" if stopped else "length"
        generation = Generation(self.token_ids, self._text, self.cluster_id, reason) if finished else None
        return Token(row, token_id, shown, generation)

    def end(self, row: int, reason: FinishReason, error: ChameleonError | None = None) -> Token:
        """End the row without another token."""
        generation = Generation(self.token_ids, self._text, self.cluster_id, reason, error)
        return Token(row, -1, self._text[self._shown :], generation)

    def _decoded(self, tokenizer: Any, token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    def _held_back(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        lengths = (
            n for stop in self.sampling.stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])
        )  # fmt: skip
        return max(lengths, default=0)


def begin_rows(
    prompts: Sequence[Sequence[int]],
    cluster_ids: IntArray,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | Sequence[Sampling],
    max_positions: int,
    n: int = 1,
) -> list[Row]:
    """n rows of each prompt, one prompt's beside each other.

    With one Sampling for all, row i draws from random stream i; with one per prompt, its k-th row from stream k.

    Raises InputError.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    single = isinstance(sampling, Sampling)
    samplings: list[Sampling] = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    for name, values in (("max_new_tokens", limits), ("sampling", samplings)):
        if len(values) != len(prompts):
            raise InputError(f"{len(values)} values of {name} for {len(prompts)} prompts: pass one, or one per prompt")
    if min(limits) < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {min(limits)}")
    return [
        # The last new token is never fed back, so it needs no position.
        Row(ids, min(limits[i], max_positions - len(ids) + 1), samplings[i], i * n * single + k, int(cluster_ids[i]))
        for i, ids in enumerate(prompts)
        for k in range(n)
    ]


def stream_tokens(
    rows: list[Row], decoder: Decoder, adaptation: Adaptation, tokenizer: Any, model: ModelSpec
) -> Iterator[Token]:
    """Tokens of all rows, step by step; within a step in the order of the rows."""
    capacity = max(len(row.prompt) + row.limit - 1 for row in rows)
    logits, cache = decoder.prefill([row.prompt for row in rows], adaptation, capacity)
    active = np.arange(len(rows))
    while True:
        going, chosen = [], []
        if isinstance(logits, DeviceLogits) and all(rows[row].is_greedy for row in active):
            token_ids: Iterator[int] = iter(logits.greedy().tolist())  # nothing but the chosen ids leaves the device
        else:
            values = np.asarray(logits)
            token_ids = (rows[row].choose(values[i]) for i, row in enumerate(active))
        for i, (row, token_id) in enumerate(zip(active, token_ids, strict=True)):
            token = rows[row].append(token_id, int(row), tokenizer, model.eos_token_id)
            if token.generation is None:
                going.append(i)
                chosen.append(token.token_id)
            yield token
        if not going:
            return
        if len(going) < len(active):
            kept = np.array(going)
            cache, adaptation, active = decoder.keep(cache, kept), adaptation.rows(kept), active[kept]
        logits = decoder.step(np.array(chosen, np.int64), adaptation, cache)
