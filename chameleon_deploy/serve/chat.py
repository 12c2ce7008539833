"""/v1/chat/completions: from a conversation to the engine, and from its tokens to an answer or a stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response

from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime import Conversation, Stream, StructuredOutputs, Token
from chameleon_deploy.runtime.chat.template import chat_prompt
from chameleon_deploy.runtime.chat.tool_calls import (
    Family,
    ToolCall,
    ToolCallParser,
    calls_grammar,
    family_of,
    hidden_marks,
)
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.chat_schemas import (
    Answer,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChatUsage,
    ChunkChoice,
    Delta,
    FunctionChoice,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from chameleon_deploy.serve.completions import (
    REASONS,
    generate_options,
    outputs_field,
    outputs_of,
    raise_failure,
    sampling_of,
)
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.event_stream import EventStream, events
from chameleon_deploy.serve.logprobs import LOWEST
from chameleon_deploy.serve.models import Meant
from chameleon_deploy.serve.schemas import ChoiceAdaptation, CohortInfo, PromptDetails
from chameleon_deploy.serve.scoring import adapt_options
from chameleon_deploy.serve.service import ServedModel

_FIELDS = {
    "prompts": "messages", "max_new_tokens": "max_completion_tokens", "template_arguments": "chat_template_kwargs"
}  # fmt: skip


async def complete_chat(call: Call[ChatRequest]) -> ChatCompletion | Response:
    """Answer one conversation; where the request is cancelled, its rows are."""
    job = await submit(call)
    return EventStream(events(_chunks(job))) if job.body.stream else await _whole(job)


async def submit(call: Call[ChatRequest]) -> Job:
    """Check and submit a conversation. Raises ApiError."""
    check(call.body)
    outputs = _forced_calls(call) if _forces_calls(call.body) else outputs_of(call.body)
    return await call.off_loop(lambda: prepare(call, outputs), lambda job: job.stream.cancel(), outputs)


@dataclass(frozen=True)
class Job:
    """A conversation that was checked and submitted.

    family  of the tool calls that are looked for; None where there are no tools
    marks   special tokens that mark tool calls
    """

    id: str
    created: int
    meant: Meant
    body: ChatRequest
    served: ServedModel
    ids: list[int]
    stream: Stream
    family: Family | None
    marks: Mapping[int, str]

    @property
    def head(self) -> dict[str, Any]:
        """The fields that whole answers and chunks begin with."""
        return {"id": self.id, "created": self.created, "model": self.meant.model,
                "system_fingerprint": self.served.fingerprint(self.meant)}  # fmt: skip

    @property
    def adaptation(self) -> ChoiceAdaptation:
        cohort = self.stream.cohort
        info = CohortInfo(cohort.id, cohort.size) if cohort else None
        return ChoiceAdaptation(self.meant.mode, self.stream.cluster_ids[0], info)

    def usage(self, new_tokens: int) -> ChatUsage:
        cached = PromptDetails(self.stream.cached_tokens[0])
        return ChatUsage(len(self.ids), new_tokens, len(self.ids) + new_tokens, cached)


def prepare(call: Call[ChatRequest], outputs: StructuredOutputs | None) -> Job:
    """Check a request and submit it. Raises ApiError or a ChameleonError."""
    body, served = call.body, call.served
    meant = served.models.hold(body)
    tools = [msgspec.to_builtins(tool) for tool in body.tools or ()] if body.tool_choice != "none" else []
    limit = body.max_completion_tokens or body.max_tokens or served.models.max_length
    try:
        template = served.runtime.chat_template
        sampling = sampling_of(body, served, (body.top_logprobs or 0) if body.logprobs else None, outputs)
        conversation = Conversation(
            msgspec.to_builtins(body.messages),
            tools or None,
            body.continue_final_message,
            body.chat_template_kwargs or {},
            served.sanitize_control_tokens,
        )
        ids, generate = chat_prompt(template, conversation, generate_options(call, limit, [sampling]))
        stream = served.engine.submit([ids], generate, adapt_options(call, meant, 1), call.share)
    except ChameleonError as error:
        fields = {**_FIELDS, "structured_outputs": "tools" if _forces_calls(body) else outputs_field(body)}
        raise api_error(error, fields.get(error.argument or "", error.argument)) from error
    call.streams.append(stream)
    served.count_prompt(meant.mode, stream.cluster_ids[0])
    family = family_of(template.source) if tools else None
    marks = hidden_marks(served.runtime.tokenizer) if tools else {}
    return Job(f"chatcmpl-{call.request_id}", int(time.time()), meant, body, served, ids, stream, family, marks)


def check(body: ChatRequest) -> None:
    """Check what a field's own range cannot say. Raises ApiError."""
    forced, names = _forces_calls(body), [tool.function.name for tool in body.tools or ()]
    named = body.tool_choice.function.name if isinstance(body.tool_choice, FunctionChoice) else None
    for param, fault, message in (
        ("stream_options", body.stream_options is not None and not body.stream, "stream_options needs stream"),
        ("top_logprobs", body.top_logprobs is not None and not body.logprobs, "top_logprobs needs logprobs"),
        ("tool_choice", forced and not names, "tool_choice needs tools"),
        ("tool_choice", named is not None and named not in names, f"no tool has the name {named!r}"),
        (
            "structured_outputs",
            forced and body.structured_outputs is not None,
            "structured_outputs and a forced call exclude each other",
        ),
    ):
        if fault:
            raise ApiError(400, "input_invalid", message, param)


def _forces_calls(body: ChatRequest) -> bool:
    return body.tool_choice not in ("none", "auto")


def _forced_calls(call: Call[ChatRequest]) -> StructuredOutputs:
    """Return the grammar of the calls that tool_choice asks for. Raises ApiError."""
    body, runtime = call.body, call.served.runtime
    named = body.tool_choice.function.name if isinstance(body.tool_choice, FunctionChoice) else None
    functions = {
        tool.function.name: tool.function.parameters for tool in body.tools or () if named in (None, tool.function.name)
    }
    several = body.parallel_tool_calls and named is None
    try:
        family = family_of(runtime.chat_template.source)
        return StructuredOutputs(grammar=calls_grammar(family, functions, several, runtime.tokenizer))
    except ChameleonError as error:
        raise api_error(error, "tools" if error.argument == "structured_outputs" else error.argument) from error


class RowWriter:
    """Writes the answer of one row, token by token."""

    def __init__(self, job: Job, row: int) -> None:
        self._job, self._row, self._calls = job, row, 0
        self._parser = ToolCallParser(job.family) if job.family else None

    def part(self, token: Token) -> ChunkChoice:
        """A token with the text and the calls that are certain by now."""
        delta = Delta()
        for piece in self._pieces(token):
            if isinstance(piece, str):
                delta.content = (delta.content or "") + piece
            elif not self._calls or self._job.body.parallel_tool_calls:
                call = ToolCallDelta(id=piece.id, function=CalledFunction(name=piece.name, arguments=piece.arguments))
                call.index = self._calls
                delta.tool_calls = [*(delta.tool_calls or ()), call]
                self._calls += 1
        choice = ChunkChoice(
            index=self._row,
            delta=delta,
            logprobs=self._logprobs(token) if self._job.body.logprobs else None,
            finish_reason=None,
            chameleon=self._job.adaptation,
        )
        if token.generation is not None:
            choice.finish_reason = REASONS.get(token.generation.finish_reason, "length")
            if choice.finish_reason == "stop" and self._calls:
                choice.finish_reason = "tool_calls"
        if self._job.body.return_token_ids:
            choice.token_ids = [token.token_id] if token.token_id >= 0 else []
        return choice

    def _pieces(self, token: Token) -> list[str | ToolCall]:
        if self._parser is None:
            return [token.text] if token.text else []
        pieces = self._parser.feed(token.text + self._job.marks.get(token.token_id, ""))
        return pieces if token.generation is None else [*pieces, *self._parser.finish()]

    def _logprobs(self, token: Token) -> ChatLogprobs:
        if token.token_id < 0 or token.logprob is None:
            return ChatLogprobs([])
        top = [TopLogprob(*self._named(*alternative)) for alternative in token.top_logprobs or ()]
        return ChatLogprobs([TokenLogprob(*self._named(token.token_id, token.logprob), top)])

    def _named(self, token_id: int, logprob: float) -> tuple[str, float, list[int] | None]:
        name = self._job.served.names[token_id]
        if name.startswith("bytes:"):
            found = list(bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")))
        return name, max(logprob, LOWEST), found if name.startswith("bytes:") else list(name.encode())


async def _whole(job: Job) -> ChatCompletion:
    parts: list[list[ChunkChoice]] = [[] for _ in range(job.body.n)]
    new_tokens = 0
    async with contextlib.aclosing(row_parts(job)) as choices:
        async for count, choice in choices:
            parts[choice.index].append(choice)
            new_tokens += count
    return ChatCompletion(**job.head, choices=[_joined(job, row) for row in parts], usage=job.usage(new_tokens))


def _joined(job: Job, parts: list[ChunkChoice]) -> ChatChoice:
    """One choice from its parts in a stream."""
    text = "".join(part.delta.content or "" for part in parts)
    calls = [call for part in parts for call in part.delta.tool_calls or ()]
    answer = Answer(content=text if text or not calls else None)
    if calls:
        answer.tool_calls = [msgspec.structs.replace(call, index=msgspec.UNSET) for call in calls]
    logprobs = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    reason = parts[-1].finish_reason
    choice = ChatChoice(
        index=parts[-1].index,
        message=answer,
        logprobs=ChatLogprobs(logprobs) if job.body.logprobs else None,
        finish_reason=reason or "stop",
        chameleon=job.adaptation,
    )
    if job.body.return_token_ids:
        choice.token_ids = [token_id for part in parts for token_id in part.token_ids or ()]
        choice.prompt_token_ids = job.ids
    return choice


async def _chunks(job: Job) -> AsyncGenerator[ChatChunk, None]:
    options, new_tokens = job.body.stream_options, 0
    continuous = options is not None and options.continuous_usage_stats

    def chunk(choices: list[ChunkChoice], with_usage: bool) -> ChatChunk:
        found = ChatChunk(**job.head, choices=choices)
        found.usage = job.usage(new_tokens) if with_usage else None
        return found

    async with contextlib.aclosing(row_parts(job)) as choices:
        for row in range(job.body.n):
            delta = Delta(role="assistant", content="")
            begin = ChunkChoice(
                index=row, delta=delta, logprobs=None, finish_reason=None, chameleon=job.adaptation
            )  # fmt: skip
            yield chunk([begin], continuous)
        async for count, choice in choices:
            new_tokens += count
            delta = choice.delta
            if delta.content or delta.tool_calls or choice.logprobs or choice.finish_reason or choice.token_ids:
                yield chunk([choice], continuous)
    if options is not None and (options.include_usage or continuous):
        yield chunk([], with_usage=True)


async def row_parts(job: Job) -> AsyncGenerator[tuple[int, ChunkChoice], None]:
    """Every token of the engine, as 1, or as 0 where a row ends without one, and what is written of it."""
    writers = [RowWriter(job, row) for row in range(job.body.n)]
    try:
        async for token in job.stream:
            raise_failure(token.generation)
            yield int(token.token_id >= 0), writers[token.row].part(token)
    finally:
        job.stream.cancel()
