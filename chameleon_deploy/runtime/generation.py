"""Generating text: sample, stop, drop finished rows, decode one step, again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from tokenizers.decoders import DecodeStream

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.runtime.adaptation import Adaptation
from chameleon_deploy.runtime.decoder import Decoder
from chameleon_deploy.runtime.device_logits import DeviceLogits
from chameleon_deploy.runtime.sampling import Choice, Sampler
from chameleon_deploy.runtime.sampling_settings import Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """token_ids are the new ones, a stop token included; text leaves out the stop token or stop string.

    token_logprobs  log-probability of each of token_ids; None unless Sampling.logprobs is set
    top_logprobs    (token id, log-probability) of the most probable tokens at the place of each of token_ids, likewise
    """

    token_ids: list[int]
    text: str
    cluster_id: int
    finish_reason: FinishReason
    token_logprobs: list[float] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None


@dataclass(frozen=True)
class Token:
    """One step of one row: text is what can be shown now, and may be empty or hold several tokens' characters.

    generation    set on a row's last Token
    logprob       log-probability of token_id; None unless Sampling.logprobs is set
    top_logprobs  (token id, log-probability) of the most probable tokens, highest first, likewise
    """

    row: int
    token_id: int
    text: str
    generation: Generation | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class Row:
    """A row while it is being generated.

    sampler  chooses its tokens; `append` counts them
    """

    def __init__(self, ids: Sequence[int], limit: int, sampling: Sampling, stream: int, cluster_id: int) -> None:
        self.prompt, self.limit, self.sampling, self.cluster_id = ids, limit, sampling, cluster_id
        self.sampler = Sampler(sampling, ids, stream)
        self.token_ids: list[int] = []
        self._choices: list[Choice] = []
        self._decode = DecodeStream(skip_special_tokens=True)
        self._text = ""
        self._shown = 0  # characters of the text that the caller has been given

    def append(self, choice: Choice, row: int, tokenizer: Any, eos_token_id: int) -> Token:
        token_id = choice.token_id
        self.sampler.append(token_id)
        self.token_ids.append(token_id)
        self._choices.append(choice)
        stopped = self._is_stop_token(token_id, eos_token_id)
        finished = stopped or len(self.token_ids) >= self.limit
        if finished:  # with the bytes of a character cut in half
            self._text = self._decoded(tokenizer, self.token_ids[:-1] if stopped else self.token_ids)
        else:
            self._text += self._decode.step(tokenizer, token_id) or ""
        cut = min((at for stop in self.sampling.stop if (at := self._text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            stopped = finished = True
            self._text = self._text[:cut]
        shown = self._text[self._shown : len(self._text) - (0 if finished else self._held_back())]
        self._shown += len(shown)
        generation = self._generation("stop" if stopped else "length") if finished else None
        return Token(row, token_id, shown, generation, choice.logprob, choice.top_logprobs)

    def _is_stop_token(self, token_id: int, eos_token_id: int) -> bool:
        is_eos = token_id == eos_token_id and not self.sampling.ignore_eos
        return is_eos or token_id in self.sampling.stop_token_ids

    def _generation(self, reason: FinishReason) -> Generation:
        generation = Generation(self.token_ids, self._text, self.cluster_id, reason)
        if self.sampling.logprobs is None:
            return generation
        _, logprobs, top_logprobs = zip(*self._choices, strict=True)
        return replace(generation, token_logprobs=list(logprobs), top_logprobs=list(top_logprobs))

    def _decoded(self, tokenizer: Any, token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    def _held_back(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        lengths = (
            n for stop in self.sampling.stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])
        )  # fmt: skip
        return max(lengths, default=0)


def stream_tokens(
    rows: list[Row], decoder: Decoder, adaptation: Adaptation, tokenizer: Any, model: ModelSpec
) -> Iterator[Token]:
    """Tokens of all rows, step by step; within a step in the order of the rows."""
    capacity = max(len(row.prompt) + row.limit - 1 for row in rows)
    logits, cache = decoder.prefill([row.prompt for row in rows], adaptation, capacity)
    active = np.arange(len(rows))
    while True:
        going, chosen = [], []
        if isinstance(logits, DeviceLogits) and all(rows[row].sampler.is_argmax for row in active):
            choices = map(Choice, logits.greedy().tolist())  # nothing but the chosen ids leaves the device
        else:
            samplers = (rows[row].sampler for row in active)
            choices = map(Sampler.choose, samplers, np.asarray(logits))
        for i, (row, choice) in enumerate(zip(active, choices, strict=True)):
            token = rows[row].append(choice, int(row), tokenizer, model.eos_token_id)
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
