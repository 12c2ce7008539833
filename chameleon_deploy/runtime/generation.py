"""Options and results of generation, and the state of a row: its tokens, its text, and when it stops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from chameleon_deploy.contract.bundle import IntArray, ModelSpec
from chameleon_deploy.errors import ChameleonError, InputError, NumericError
from chameleon_deploy.runtime.adaptation import AdaptKeywords
from chameleon_deploy.runtime.decode.logits import Logits
from chameleon_deploy.runtime.inputs import MAX_ROWS, check_integer, check_number, integer, is_sequence, per_prompt
from chameleon_deploy.runtime.sampling import Choice, Sampler
from chameleon_deploy.runtime.sampling_settings import Sampling, check_sampling
from chameleon_deploy.runtime.structured_outputs import TokenMask
from chameleon_deploy.runtime.tokenizer import DecodeStream, decode

# "error" where it is asked for (OnError) and in an Engine, "cancelled" in an Engine alone.
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
OnError = Literal["raise", "row"]

MAX_DRAFT_TOKENS = 16  # of one call; logits of each take vocab * 4 bytes


@dataclass(frozen=True)
class Generate:
    """Options of one call: they say how its prompts are continued.

    max_new_tokens  at least 1, one number or one per prompt; also bounded by the model's positions
    sampling        one Sampling for all, where row i draws from random stream i, or one per prompt, where its
                    continuation k draws from stream k, so that a row does not depend on its place in the batch
    n               continuations per prompt, at most 65,536; row i * n + k is continuation k of prompt i
    deadline        seconds from now, after which rows that have not ended finish with reason "deadline"
    prompt_lookup_num_tokens  on the CPU, in fp32: while a single row is generated, up to this many tokens, at most 16,
                    are drafted by prompt lookup and read in one call, which is faster where the text repeats itself,
                    and slower elsewhere. The tokens are those of plain decoding. 0 is off
    cache_salt      an Engine's prefix cache shares keys and values only among requests of equal salts
    cache_generated  whether an Engine's prefix cache may give this request keys and values that steps wrote, and keep
                    its own: near those of a prompt that is read, but not bitwise equal. False takes what is equal

    Raises InputError for fields that are wrong for any prompts; a call checks the rest.
    """

    max_new_tokens: int | Sequence[int] = 20
    sampling: Sampling | Sequence[Sampling] = Sampling()  # noqa: RUF009  (immutable)
    n: int = 1
    deadline: float | None = None
    prompt_lookup_num_tokens: int = 0
    cache_salt: str = ""
    cache_generated: bool = True

    def __post_init__(self) -> None:
        for value in self.max_new_tokens if is_sequence(self.max_new_tokens) else [self.max_new_tokens]:
            if integer("max_new_tokens", value) < 1:
                raise InputError(f"max_new_tokens must be at least 1, got {value}", "max_new_tokens")
        object.__setattr__(self, "n", check_integer("n", self.n, 1, MAX_ROWS))
        if self.deadline is not None and not check_number("deadline", self.deadline, 0):
            raise InputError("deadline must be a number of seconds above 0", "deadline")
        name = "prompt_lookup_num_tokens"
        object.__setattr__(self, name, check_integer(name, self.prompt_lookup_num_tokens, 0, MAX_DRAFT_TOKENS))
        if not isinstance(self.cache_salt, str):
            kind = type(self.cache_salt).__name__
            raise InputError(f"cache_salt must be a string, got a {kind}", "cache_salt")


class GenerateKeywords(AdaptKeywords, total=False):
    """The fields of Generate and Adapt as keywords."""

    max_new_tokens: int | Sequence[int]
    sampling: Sampling | Sequence[Sampling]
    n: int
    deadline: float | None
    prompt_lookup_num_tokens: int
    cache_salt: str
    cache_generated: bool


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    token_ids       the new tokens, a stop token included
    text            without the stop token or stop string
    token_logprobs  log-probability of each of token_ids; None unless Sampling.logprobs is set
    top_logprobs    (token id, log-probability) of the most probable tokens at each position; None as above
    error           what ended the row, if finish_reason is "error"
    """

    token_ids: list[int]
    text: str
    cluster_id: int
    finish_reason: FinishReason
    token_logprobs: list[float] | None = None
    top_logprobs: list[tuple[tuple[int, float], ...]] | None = None
    error: ChameleonError | None = None


@dataclass(frozen=True)
class Token:
    """One step of one row.

    text          text that can be shown now; may be empty or hold the characters of several tokens
    token_id      -1 if the row ended without a new token
    generation    set on a row's last Token
    logprob       log-probability of token_id; None unless Sampling.logprobs is set
    top_logprobs  (token id, log-probability) of the most probable tokens, highest first; None as above
    """

    row: int
    token_id: int
    text: str
    generation: Generation | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class Row:
    """The state of a row while it is being generated.

    index    its place among the caller's rows
    sampler  chooses its tokens; `append` counts them
    """

    def __init__(
        self, index: int, ids: Sequence[int], limit: int, sampler: Sampler, cluster_id: int, is_shown: bool = True
    ) -> None:
        """is_shown: whether the tokens' text is wanted as they come"""
        sampling = sampler.sampling
        self.index = index
        self.prompt, self.limit, self.sampling, self.cluster_id = ids, limit, sampling, cluster_id
        self.sampler = sampler
        self.token_ids: list[int] = []
        self._choices: list[Choice] = []
        # Of a row that nobody watches, the text is decoded at its end.
        self._decode = DecodeStream() if is_shown or sampling.stop else None
        self._text = ""
        self._shown = 0  # number of characters that the caller was given
        self._begun = [0] * len(sampling.stop)  # where the text may begin each stop string, at the earliest

    def append(self, choice: Choice, tokenizer: Any, eos_token_id: int) -> Token:
        token_id = choice.token_id
        self.sampler.append(token_id)
        self.token_ids.append(token_id)
        self._choices.append(choice)
        stopped = self._is_stop_token(token_id, eos_token_id)
        finished = stopped or len(self.token_ids) >= self.limit
        if finished:  # include the bytes of an incomplete character
            self._text = decode(tokenizer, self.token_ids[:-1] if stopped else self.token_ids)
        elif self._decode is not None:
            self._text += self._decode.step(tokenizer, token_id)
        found = map(self._text.find, self.sampling.stop, self._begun)
        cut = min((at for at in found if at >= 0), default=-1)
        if cut >= 0:
            stopped = finished = True
            self._text = self._text[:cut]
        shown = self._text[self._shown : len(self._text) - (0 if finished else self._held_back())]
        self._shown += len(shown)
        generation = self._generation("stop" if stopped else "length") if finished else None
        return Token(self.index, token_id, shown, generation, choice.logprob, choice.top_logprobs)

    def _is_stop_token(self, token_id: int, eos_token_id: int) -> bool:
        s = self.sampling
        ends = not s.ignore_eos or s.structured_outputs is not None  # whose mask allows the end only where it is due
        return (token_id == eos_token_id and ends) or token_id in s.stop_ids

    def _generation(self, reason: FinishReason) -> Generation:
        generation = Generation(self.token_ids, self._text, self.cluster_id, reason)
        if self.sampling.logprobs is None:
            return generation
        return replace(
            generation,
            token_logprobs=[choice.logprob for choice in self._choices if choice.logprob is not None],
            top_logprobs=[choice.top_logprobs for choice in self._choices if choice.top_logprobs is not None],
        )

    def end(self, reason: FinishReason, error: ChameleonError | None = None) -> Token:
        """End the row without another token."""
        generation = replace(self._generation(reason), error=error)
        return Token(self.index, -1, self._text[self._shown :], generation)

    def _held_back(self) -> int:
        """Return how many characters at the end may begin a stop string."""
        for i, stop in enumerate(self.sampling.stop):
            # A place that does not begin the string never will, so each is looked at once.
            at = max(self._begun[i], len(self._text) - len(stop) + 1)
            while (at := self._text.find(stop[0], at)) >= 0 and not stop.startswith(self._text[at:]):
                at += 1
            self._begun[i] = at if at >= 0 else len(self._text)
        return len(self._text) - min(self._begun, default=len(self._text))


def begin_rows(
    prompts: Sequence[Sequence[int]],
    cluster_ids: IntArray,
    generate: Generate,
    model: ModelSpec,
    new_mask: Callable[[Sampling], TokenMask | None],
    capacity: int | None = None,
    is_shown: bool = True,
) -> list[Row]:
    """Return n rows for each prompt; rows of one prompt are adjacent.

    new_mask  returns the mask of a new row; None where its text is free
    capacity  tokens that a row can hold; None means the model's positions
    is_shown  whether the tokens' text is wanted as they come

    Raises InputError or TokenError.
    """
    limits = per_prompt("max_new_tokens", generate.max_new_tokens, len(prompts))
    samplings = per_prompt("sampling", generate.sampling, len(prompts))
    for each in samplings:
        check_sampling(each, model.vocab_size)
    n, first = generate.n, 0 if is_sequence(generate.sampling) else generate.n  # stream of a prompt's first row
    # The last new token is never fed back, so it needs no position.
    room = [(capacity or model.max_positions) - len(ids) + 1 for ids in prompts]
    return [
        Row(
            i * n + k,
            ids,
            min(int(limits[i]), room[i]),
            Sampler(samplings[i], ids, i * first + k, new_mask(samplings[i])),
            int(cluster_ids[i]),
            is_shown,
        )
        for i, ids in enumerate(prompts)
        for k in range(n)
    ]


def choosers(samplers: Sequence[Sampler], logits: Logits) -> list[Callable[[], Choice]]:
    """Return a function for each row that chooses its next token, or raises NumericError."""
    if all(sampler.is_argmax for sampler in samplers):  # nothing but the chosen ids leaves a device
        with contextlib.suppress(NumericError):  # of some row: find out below whose
            return [partial(Choice, token_id) for token_id in logits.greedy().tolist()]
    values = np.asarray(logits)
    return [partial(sampler.choose, values[i]) for i, sampler in enumerate(samplers)]
