"""/v1/completions: from a request to the engine, and from its tokens to a response or a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec
from starlette.responses import Response

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import ChameleonError, InputError, TokenError
from chameleon_deploy.runtime import Generate, Generation, Sampling, Stream, StructuredOutputs
from chameleon_deploy.runtime.sampling import Choice
from chameleon_deploy.runtime.sampling_settings import check_sampling
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.event_stream import EventStream, events
from chameleon_deploy.serve.logprobs import LogprobsWriter, by_id, join
from chameleon_deploy.serve.models import Meant
from chameleon_deploy.serve.prompts import as_texts, encode
from chameleon_deploy.serve.schemas import (
    ChoiceAdaptation,
    CohortInfo,
    Completion,
    CompletionChoice,
    CompletionRequest,
    GenerationRequest,
    Logprobs,
    PromptDetails,
    Usage,
)
from chameleon_deploy.serve.scoring import adapt_options, score_prompts
from chameleon_deploy.serve.service import ServedModel

Request = TypeVar("Request", bound=GenerationRequest)

_SEED_MASK = 2**64 - 1
_FIELDS = {"prompts": "prompt", "max_new_tokens": "max_tokens"}  # of the arguments named otherwise
REASONS: Mapping[str, Literal["stop", "deadline"]] = {"stop": "stop", "deadline": "deadline"}


async def complete(call: Call[CompletionRequest]) -> Completion | Response:
    """Answer one request; where it is cancelled, its rows are."""
    outputs = outputs_of(call.body)
    if outputs is None and call.body.adapt_text is None:
        job = await call.off_loop_if_large(lambda: prepare(call), undo=Job.cancel)
    else:
        job = await call.off_loop(lambda: prepare(call, outputs), Job.cancel, outputs)
    try:
        echoes = await _echoed(job, call)
    except BaseException:
        job.cancel()
        raise
    writers = [RowWriter(job, row, echoes[row // job.body.n]) for row in range(len(job.ids) * job.body.n)]
    if job.body.stream:
        return EventStream(events(_chunks(job, writers)))
    return await _whole(job, writers)


@dataclass(frozen=True)
class Job:
    """A request that was checked and submitted.

    ids     of every prompt
    stream  of the engine; None where no token is asked for
    """

    id: str
    created: int
    meant: Meant
    body: CompletionRequest
    served: ServedModel
    ids: list[list[int]]
    cluster_ids: list[int]
    stream: Stream | None

    def completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.meant.model,
            system_fingerprint=self.served.fingerprint(self.meant),
            choices=choices,
        )

    def usage(self, new_tokens: int) -> Usage:
        prompt_tokens = sum(map(len, self.ids))
        cached = PromptDetails(sum(self.stream.cached_tokens) if self.stream else 0)
        return Usage(prompt_tokens, new_tokens, prompt_tokens + new_tokens, cached)

    def cancel(self) -> None:
        if self.stream is not None:
            self.stream.cancel()


def prepare(call: Call[CompletionRequest], outputs: StructuredOutputs | None = None) -> Job:
    """Check a request and submit it. Raises ApiError or a ChameleonError."""
    body, served = call.body, call.served
    meant = served.models.hold(body)
    mode = meant.mode
    check(body, mode, served)
    sampling = sampling_of(body, served, body.logprobs, outputs)
    ids = encode(body.prompt, "prompt", served)
    stream = _submit(call, ids, sampling, meant) if body.max_tokens else None
    cluster_ids = list(stream.cluster_ids) if stream else served.runtime.embed(ids)[1].tolist()
    for cluster_id in cluster_ids:
        served.count_prompt(mode, cluster_id)
    return Job(f"cmpl-{call.request_id}", int(time.time()), meant, body, served, ids, cluster_ids, stream)


def check(body: CompletionRequest, mode: Mode, served: ServedModel) -> None:
    """Check what a field's own range cannot say. Raises ApiError."""
    joins_others = served.cohort_window_ms > 0 and mode in ("cohort", "tenant")
    for param, fault, message in (
        ("max_tokens", body.max_tokens == 0 and not body.echo, "max_tokens may be 0 only with echo"),
        ("best_of", body.best_of not in (1, body.n), "best_of must be 1 or equal n"),
        ("suffix", bool(body.suffix), "suffix is not supported: leave it out"),
        ("stream_options", body.stream_options is not None and not body.stream, "stream_options needs stream"),
        ("echo", body.echo and body.logprobs is not None and joins_others,
         f"log-probabilities of a prompt cannot be given in mode {mode!r} while its cohort joins other requests"),
    ):  # fmt: skip
        if fault:
            raise ApiError(400, "input_invalid", message, param)


def outputs_of(body: GenerationRequest) -> StructuredOutputs | None:
    """Return what the text must be. Raises ApiError."""
    format_, constraint, param = body.response_format, body.structured_outputs, outputs_field(body)
    try:
        if format_ is None or format_.type == "text":
            return StructuredOutputs(**msgspec.structs.asdict(constraint)) if constraint is not None else None
        if constraint is not None:
            raise InputError("response_format and structured_outputs exclude each other: pass one")
        if format_.type == "json_object":
            return StructuredOutputs(json={"type": "object"})
        if format_.json_schema is None or format_.json_schema.schema is None:
            raise InputError("the type json_schema needs json_schema with a schema")
        return StructuredOutputs(json=format_.json_schema.schema)
    except InputError as error:
        raise api_error(error, param) from error


def outputs_field(body: GenerationRequest) -> str:
    """Return the field that says what the text must be."""
    format_ = body.response_format
    return "structured_outputs" if format_ is None or format_.type == "text" else "response_format"


def sampling_of(
    body: GenerationRequest, served: ServedModel, logprobs: int | None, outputs: StructuredOutputs | None
) -> Sampling:
    """Return the sampling that a request asks for. Raises ApiError."""
    try:
        sampling = Sampling(
            temperature=body.temperature,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            repetition_penalty=body.repetition_penalty,
            seed=secrets.randbits(64) if body.seed is None else body.seed & _SEED_MASK,
            stop_token_ids=body.stop_token_ids or (),
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias or {},
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
            structured_outputs=outputs,
        )
        check_sampling(sampling, served.runtime.manifest.model.vocab_size)
    except TokenError as error:
        raise ApiError(400, error.code, str(error), error.argument) from error
    except InputError as error:
        raise api_error(error, error.argument) from error
    return sampling


def generate_options(call: Call[Request], limit: int, sampling: Sequence[Sampling]) -> Generate:
    """Return how the prompts of a request are continued."""
    body = call.body
    return Generate(
        max_new_tokens=limit,
        sampling=sampling,
        n=body.n,
        deadline=body.deadline,
        prompt_lookup_num_tokens=body.prompt_lookup_num_tokens,
        cache_salt=call.salt + body.cache_salt,
        cache_generated=body.cache_generated,
    )


def _submit(call: Call[CompletionRequest], ids: list[list[int]], sampling: Sampling, meant: Meant) -> Stream:
    body = call.body
    try:
        # Each prompt is as if it were alone.
        generate = generate_options(call, body.max_tokens, [sampling] * len(ids))
        stream = call.served.engine.submit(ids, generate, adapt_options(call, meant, len(ids)), call.share)
    except ChameleonError as error:
        fields = {**_FIELDS, "structured_outputs": outputs_field(body)}
        raise api_error(error, fields.get(error.argument or "", error.argument)) from error
    call.streams.append(stream)
    return stream


async def _echoed(job: Job, call: Call[CompletionRequest]) -> list[Echo | None]:
    """Return the text that comes before the new text of every prompt."""
    body, served = job.body, job.served
    if not body.echo:
        return [None] * len(job.ids)
    scores = None
    if body.logprobs is not None:
        adapt = adapt_options(call, job.meant, len(job.ids))
        scores = await score_prompts(served, job.ids, adapt, body.logprobs)
    given = as_texts(body.prompt)
    return [
        Echo(
            text if isinstance(text, str) else served.runtime.tokenizer.decode(ids, skip_special_tokens=False),
            None if scores is None else [Choice(ids[0]), *scores[i]],
        )
        for i, (text, ids) in enumerate(zip(given, job.ids, strict=True))
    ]


@dataclass(frozen=True)
class Echo:
    """A prompt as its response repeats it: choices of its tokens where log-probabilities are asked for."""

    text: str
    choices: list[Choice] | None


class RowWriter:
    """Writes the choices of one row: whole, or piece by piece."""

    def __init__(self, job: Job, row: int, echo: Echo | None) -> None:
        self._job, self._row, self._echo = job, row, echo
        self._prompt = row // job.body.n
        self._name = by_id if job.body.return_tokens_as_token_ids else job.served.names.__getitem__
        self._logprobs = self._writer(len(echo.text) if echo else 0)

    def echo(self) -> CompletionChoice | None:
        """The part of the prompt; None where it is not asked for."""
        if self._echo is None:
            return None
        choices = self._echo.choices
        logprobs = None if choices is None else self._writer(0, special=True).write(choices)
        return self._choice(self._echo.text, logprobs, reason=None, token_ids=[])

    def part(self, text: str, choices: list[Choice], reason: str | None) -> CompletionChoice:
        """Some new tokens and the text that they add."""
        logprobs = None if self._job.body.logprobs is None else self._logprobs.write(choices)
        return self._choice(text, logprobs, reason, [choice.token_id for choice in choices])

    def whole(self, generation: Generation | None = None) -> CompletionChoice:
        """generation: None where no token was asked for"""
        echo = self.echo()
        if generation is None:
            return msgspec.structs.replace(echo, finish_reason="length") if echo else self.part("", [], "length")
        new = self.part(generation.text, _choices(generation), generation.finish_reason)
        if echo is None:
            return new
        logprobs = join(echo.logprobs, new.logprobs) if echo.logprobs and new.logprobs else None
        return msgspec.structs.replace(new, text=echo.text + new.text, logprobs=logprobs)

    def _writer(self, offset: int, special: bool = False) -> LogprobsWriter:
        return LogprobsWriter(self._job.served.runtime.tokenizer, self._name, offset, special)

    def _choice(
        self, text: str, logprobs: Logprobs | None, reason: str | None, token_ids: list[int]
    ) -> CompletionChoice:
        job = self._job
        cohort = job.stream.cohort if job.stream else None
        choice = CompletionChoice(
            index=self._row,
            text=text,
            logprobs=logprobs,
            finish_reason=None if reason is None else REASONS.get(reason, "length"),
            chameleon=ChoiceAdaptation(
                job.meant.mode, job.cluster_ids[self._prompt], CohortInfo(cohort.id, cohort.size) if cohort else None
            ),
        )
        if job.body.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = token_ids, job.ids[self._prompt]
        return choice


def _choices(generation: Generation) -> list[Choice]:
    if generation.token_logprobs is None or generation.top_logprobs is None:
        return [Choice(token_id) for token_id in generation.token_ids]
    return list(map(Choice, generation.token_ids, generation.token_logprobs, generation.top_logprobs))


async def _whole(job: Job, writers: list[RowWriter]) -> Completion:
    generations: list[Generation | None] = [None] * len(writers)
    if job.stream is not None:
        try:
            generations = list(await job.stream)
        finally:
            job.cancel()
    for generation in generations:
        raise_failure(generation)
    completion = job.completion([writer.whole(generations[row]) for row, writer in enumerate(writers)])
    completion.usage = job.usage(sum(len(generation.token_ids) for generation in generations if generation))
    return completion


async def _chunks(job: Job, writers: list[RowWriter]) -> AsyncGenerator[Completion, None]:
    options, new_tokens = job.body.stream_options, 0
    continuous = options is not None and options.continuous_usage_stats

    def chunk(choice: CompletionChoice) -> Completion:
        completion = job.completion([choice])
        completion.usage = job.usage(new_tokens) if continuous else None
        return completion

    for choice in _echo_chunks(job, writers):
        yield chunk(choice)
    if job.stream is not None:
        try:
            async for token in job.stream:
                raise_failure(token.generation)
                choices = [] if token.token_id < 0 else [Choice(token.token_id, token.logprob, token.top_logprobs)]
                new_tokens += len(choices)
                reason = token.generation.finish_reason if token.generation else None
                yield chunk(writers[token.row].part(token.text, choices, reason))
        finally:
            job.cancel()
    if options is not None and (options.include_usage or continuous):
        completion = job.completion([])
        completion.usage = job.usage(new_tokens)
        yield completion


def _echo_chunks(job: Job, writers: list[RowWriter]) -> Iterator[CompletionChoice]:
    """The prompts; the whole answer where no token is asked for."""
    for writer in writers:
        choice = writer.whole() if job.stream is None else writer.echo()
        if choice is not None:
            yield choice


def raise_failure(generation: Generation | None) -> None:
    """Raises what ended a row, where it did not end by itself."""
    if generation is None or generation.finish_reason in ("stop", "length", "deadline"):
        return
    if isinstance(generation.error, ChameleonError):
        raise generation.error
    raise ApiError(503, "closed", "the request was cancelled before its end")
