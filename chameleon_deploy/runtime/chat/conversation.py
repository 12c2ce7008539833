"""A conversation as callers give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from chameleon_deploy.errors import InputError

Message = Mapping[str, Any]
Messages = Union[Sequence[Message], "Conversation"]
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages, and how they become a prompt.

    Raises InputError for messages without a role that is known, or with content that is no text.

    messages                 each a mapping with a "role", one of ROLES, and "content", a text or a list of parts
                             {"type": "text", "text": ...}; an assistant's may have "tool_calls" and "reasoning_content"
    tools                    {"type": "function", "function": {"name", "description", "parameters"}}; None is no tools
    continue_final_message   continue the text of the last message, instead of beginning an answer
    template_arguments       variables of the template, such as enable_thinking
    sanitize_control_tokens  read what spells a control token as plain text, but for the assistant's own text
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    continue_final_message: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    sanitize_control_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.messages, str | Mapping) or not isinstance(self.messages, Sequence) or not self.messages:
            raise InputError("messages must be a list of at least one message", "messages")
        for i, message in enumerate(self.messages):
            if fault := _fault(message):
                raise InputError(f"messages[{i}] {fault}", "messages")


def _fault(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"is a {type(message).__name__}: pass a mapping with role and content"
    if message.get("role") not in ROLES:
        return f"has the role {message.get('role')!r:.40}: choose one of {', '.join(ROLES)}"
    content = message.get("content")
    if content is None:
        return None if message.get("tool_calls") else "has no content"
    if isinstance(content, str):
        return None
    if not isinstance(content, Sequence):
        return f"has content of type {type(content).__name__}: pass a text or a list of text parts"
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return 'has a part that is not {"type": "text", "text": ...}: no other kind is read'
    return None
