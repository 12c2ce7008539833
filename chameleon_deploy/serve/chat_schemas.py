"""The bodies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from chameleon_deploy.runtime.sampling_settings import MAX_LOGPROBS
from chameleon_deploy.serve.schemas import ChoiceAdaptation, GenerationRequest, Usage

FunctionName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]


class TextPart(Struct, kw_only=True):
    type: Literal["text"]
    text: str


class CalledFunction(Struct, kw_only=True):
    """arguments: a JSON object"""

    name: FunctionName
    arguments: str


class GivenToolCall(Struct, kw_only=True):
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(Struct, kw_only=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[GivenToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(Struct, kw_only=True, omit_defaults=True):
    """parameters: a JSON Schema"""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    type: Literal["function"]
    function: Function


class FunctionChoiceName(Struct, kw_only=True):
    name: FunctionName


class FunctionChoice(Struct, kw_only=True):
    type: Literal["function"]
    function: FunctionChoiceName


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, description="Default: as many as a row holds.")] | None = None
    max_tokens: Annotated[int, Meta(ge=1, description="The older name of max_completion_tokens.")] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS, description="Needs logprobs.")] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice = "auto"
    parallel_tool_calls: Annotated[bool, Meta(description="False returns the first call only.")] = True
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False


class ToolCallDelta(Struct, kw_only=True):
    """A tool call; in a stream, whole, with its place among those of its choice."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET


class Answer(Struct, kw_only=True):
    """The message of the assistant, whose content is null beside tool calls."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class Delta(Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class TopLogprob(Struct):
    """bytes: those of the token's text; null where it is not known"""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """One entry per new token. A log-probability of minus infinity is -9999.0."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "deadline"]
    chameleon: ChoiceAdaptation
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class AnswerDetails(Struct, frozen=True):
    reasoning_tokens: int = 0


class ChatUsage(Usage):
    """The details of an answer are 0: what a model reasons is part of it."""

    completion_tokens_details: AnswerDetails = AnswerDetails()


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: ChatUsage


class ChunkChoice(Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "deadline"] | None
    chameleon: ChoiceAdaptation
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: ChatUsage | UnsetType | None = UNSET
