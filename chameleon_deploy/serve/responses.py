"""/v1/responses in its stateless form: texts and function calls in and out, through a conversation."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Struct
from starlette.responses import Response

from chameleon_deploy.runtime.sampling_settings import MAX_LOGPROBS
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.chat import Job, row_parts, submit
from chameleon_deploy.serve.chat_schemas import ChatRequest, TokenLogprob, ToolCallDelta
from chameleon_deploy.serve.errors import ApiError, api_error
from chameleon_deploy.serve.event_stream import EventStream
from chameleon_deploy.serve.schemas import AdaptedRequest

LOGPROBS = "message.output_text.logprobs"  # of `include`


class ResponsesRequest(AdaptedRequest, kw_only=True):
    """Unknown fields are ignored, and null means that a field is left out."""

    input: str | Annotated[list[dict[str, Any]], Meta(description="Messages, function_call, function_call_output.")]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, description="Default: as many as a row holds.")] | None = None
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    stream: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    include: (
        Annotated[list[str], Meta(description="message.output_text.logprobs; others have nothing to add.")] | None
    ) = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS, description="Beside each token's.")] = 0
    text: dict[str, Any] | None = None
    previous_response_id: Annotated[str, Meta(description="Refused: nothing is stored.")] | None = None
    conversation: Annotated[str | dict[str, Any], Meta(description="Refused: nothing is stored.")] | None = None
    background: Annotated[bool, Meta(description="True is refused: nothing is stored.")] = False


class ResponseObject(Struct, kw_only=True):
    """output: messages and function calls"""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    error: None = None
    store: Literal[False] = False


async def respond(call: Call[ResponsesRequest]) -> ResponseObject | Response:
    """Answer one conversation; where the request is cancelled, its row is."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(call.body, name):
            raise ApiError(400, "input_invalid", "nothing is stored here: send all messages in input", name)
    try:
        body: Any = msgspec.convert(_chat_body(call.body), ChatRequest)
        job = await submit(cast(Call[ChatRequest], replace(call, body=body)))
    except msgspec.ValidationError as error:
        field = str(error).rpartition("$.")[2].partition("[")[0].partition(".")[0].rstrip("`")
        raise ApiError(400, "input_invalid", f"the body is not valid: {error}", _FIELDS.get(field, field)) from None
    except ApiError as error:
        raise replace(error, param=_FIELDS.get(error.param or "", error.param)) from None
    if call.body.stream:
        return EventStream(_encoded(_events(job, call.body)))
    async with contextlib.aclosing(_events(job, call.body)) as events:
        async for event in events:
            last = event
    found: ResponseObject = last["response"]
    return found


_FIELDS = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text"}


def _chat_body(body: ResponsesRequest) -> dict[str, Any]:
    """Return the same request as /v1/chat/completions takes it."""
    begin = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    format_ = (body.text or {}).get("format")
    found: dict[str, Any] = {
        "messages": _messages([*begin, *items]),
        "max_completion_tokens": body.max_output_tokens,
        "tools": body.tools and [_nested(tool, "function") for tool in body.tools],
        "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else _nested(body.tool_choice, "function"),
        "response_format": _nested(format_, "json_schema") if isinstance(format_, dict) else format_,
    }
    if LOGPROBS in (body.include or ()):
        found |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    same = (*AdaptedRequest.__struct_fields__, "temperature", "top_p", "parallel_tool_calls")
    found |= {name: getattr(body, name) for name in same}
    return {name: value for name, value in found.items() if value is not None}


def _nested(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tool or a format as chat has it, with its fields below its type."""
    fields = {key: value for key, value in given.items() if key != "type"}
    return {"type": given.get("type"), **({name: fields} if fields else {})}


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            messages[-1].setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": function})
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        else:
            raise ApiError(400, "input_invalid", f"an item of type {kind!r:.40} is not read here", "input")
    return messages


def _content(content: Any) -> Any:
    """Return the parts of a message with the type that chat has."""
    if not isinstance(content, list):
        return content
    texts = ("input_text", "output_text")
    return [
        {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in texts else part for part in content
    ]


async def _encoded(events: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """Write a stream; an error in the middle is an event, after which it ends."""
    number = 0

    def written(event: Mapping[str, Any]) -> bytes:
        data = msgspec.json.encode({**event, "sequence_number": number})
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)

    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield written(event)
                number += 1
    except Exception as error:
        detail = api_error(error).body.error
        yield written({"type": "error", "code": detail.code, "message": detail.message, "param": detail.param})


class Output:
    """The items of an answer, and the events that tell of them."""

    def __init__(self, name: str) -> None:
        self.items: list[dict[str, Any]] = []
        self._name, self._message = name, False  # whether the last item is a message that goes on

    def text(self, delta: str, logprobs: Sequence[TokenLogprob]) -> Iterator[dict[str, Any]]:
        if not self._message:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._added({"type": "message", "role": "assistant", "content": [part]})
            yield self._event("content_part.added", part=part, content_index=0)
            self._message = True
        (part,) = self.items[-1]["content"]
        part["text"] += delta
        part["logprobs"] += logprobs
        yield self._event("output_text.delta", delta=delta, content_index=0, logprobs=logprobs)

    def call(self, call: ToolCallDelta) -> Iterator[dict[str, Any]]:
        yield from self.end()
        name, given = call.function.name, call.function.arguments
        yield self._added({"type": "function_call", "call_id": call.id, "name": name, "arguments": ""})
        yield self._event("function_call_arguments.delta", delta=given)
        self.items[-1]["arguments"] = given
        yield self._event("function_call_arguments.done", arguments=given, name=name)
        yield self._done()

    def end(self) -> Iterator[dict[str, Any]]:
        """End the message that goes on, if one does."""
        if self._message:
            self._message = False
            (part,) = self.items[-1]["content"]
            yield self._event("output_text.done", text=part["text"], content_index=0, logprobs=part["logprobs"])
            yield self._event("content_part.done", part=part, content_index=0)
            yield self._done()

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        self.items.append({**item, "id": f"item_{self._name}_{len(self.items)}", "status": "in_progress"})
        return self._event("output_item.added", item=self.items[-1])

    def _done(self) -> dict[str, Any]:
        self.items[-1]["status"] = "completed"
        return self._event("output_item.done", item=self.items[-1])

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"output_index": len(self.items) - 1, "item_id": self.items[-1]["id"]}
        return {"type": f"response.{kind}", **place, **fields}


async def _events(job: Job, body: ResponsesRequest) -> AsyncGenerator[dict[str, Any], None]:
    """Return the events of an answer; the last holds all of it."""
    output, new_tokens, reason = Output(job.id.removeprefix("chatcmpl-")), 0, None
    response = ResponseObject(
        id=job.id.replace("chatcmpl-", "resp_"), created_at=job.created, model=job.meant.model, output=output.items,
        tools=body.tools or [], tool_choice=body.tool_choice, parallel_tool_calls=body.parallel_tool_calls,
    )  # fmt: skip
    yield {"type": "response.created", "response": response}
    logprobs: list[TokenLogprob] = []  # of tokens whose text has not come yet
    async with contextlib.aclosing(row_parts(job)) as choices:
        async for count, choice in choices:
            new_tokens, reason = new_tokens + count, choice.finish_reason or reason
            logprobs += choice.logprobs.content if choice.logprobs else ()
            if choice.delta.content or choice.delta.tool_calls:
                written, logprobs = logprobs, []
            for event in output.text(choice.delta.content, written) if choice.delta.content else ():
                yield event
            for event in itertools.chain.from_iterable(map(output.call, choice.delta.tool_calls or ())):
                yield event
    for event in output.end():
        yield event
    response.status = "incomplete" if reason == "length" else "completed"
    response.incomplete_details = {"reason": "max_output_tokens"} if reason == "length" else None
    usage = job.usage(new_tokens)
    response.usage = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": new_tokens, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }  # fmt: skip
    yield {"type": f"response.{response.status}", "response": response}
