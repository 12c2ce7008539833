"""The chat template of a bundle: from a conversation to a prompt's text and its token ids.

The text is that of `transformers`' apply_chat_template. Its token ids are too, but for one thing: what a message, a
tool or an argument says is text, also where it spells a control token such as `<|im_end|>`, so that nobody who writes
a message ends it and opens another.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from chameleon_deploy.errors import DependencyError, InputError, ManifestError
from chameleon_deploy.runtime.bounded_process import BoundedProcess
from chameleon_deploy.runtime.chat.control_tokens import ControlTokens, plain_ids
from chameleon_deploy.runtime.chat.conversation import Conversation, Message, Messages
from chameleon_deploy.runtime.generation import Generate
from chameleon_deploy.runtime.inputs import chosen, is_sequence
from chameleon_deploy.runtime.sampling_settings import Sampling

Mark = Callable[[str], Any]

CPU_SECONDS = 2.0  # of one rendering, or of reading the template
MEMORY = 512 * 2**20  # bytes of address space
MAX_NEW_TOKENS = 1024  # of an answer, where nothing else is said
MAX_TEMPLATE = 2**20  # bytes of a template
_PROGRAM = Path(__file__).with_name("render_process.py")
_MAX_DEPTH = 100  # of lists and mappings in one another
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what an assistant thought; the first is standard
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG"


class ChatTemplate:
    """A template, and the tokenizer whose control tokens it writes. Safe to use from any thread.

    source  of the template, in Jinja
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        """tokenizer: a `tokenizers.Tokenizer`

        Raises ManifestError for a template that is not valid, DependencyError without jinja2.
        """
        if importlib.util.find_spec("jinja2") is None:
            raise DependencyError("a chat template needs jinja2: pip install 'chameleon-deploy[serve]'")
        self.source, self._tokenizer = source, tokenizer
        self._process = BoundedProcess(_PROGRAM, CPU_SECONDS, MEMORY, source)
        if "error" in self._process.first_answer:
            raise ManifestError(f"the chat template is not valid: {self._process.first_answer['error']}")

    def render(self, conversation: Conversation, add_generation_prompt: bool | None = None) -> str:
        """Return the prompt's text, as apply_chat_template gives it.

        add_generation_prompt  begin the assistant's answer; None does, unless its last message is continued

        Raises InputError where the template does, or takes too long or too much.
        """
        return self._render(conversation, add_generation_prompt, str)

    def encode(self, conversation: Conversation, add_generation_prompt: bool | None = None) -> list[int]:
        """Return the prompt's token ids. Arguments and errors as in `render`."""
        if not conversation.sanitize_control_tokens:
            return plain_ids(self._tokenizer, self.render(conversation, add_generation_prompt))
        control = self._control
        marker = _absent_character(self.source, conversation)
        marks = {ord(character): character + marker for character in control.first}
        marks |= {ord(character): marker + marks.get(ord(character), character) for character in control.last}
        text = self._render(conversation, add_generation_prompt, lambda text: text.translate(marks))
        return control.encode(text, marker)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Return the control tokens that end the assistant's turn: the first after its text, the last after calls."""
        found = []
        calls = _tool_calls({"text": _PROBE})
        for place, answer in ((0, {"content": _PROBE}), (-1, {"content": "", "tool_calls": calls})):
            try:
                text = self.render(Conversation([_HELLO, {"role": "assistant", **answer}]), add_generation_prompt=False)
            except InputError:
                continue
            _, written, rest = text.rpartition(_PROBE)
            if written and (tokens := self._control.pattern.findall(rest)):
                found.append(int(self._tokenizer.token_to_id(tokens[place])))
        return tuple(dict.fromkeys(found))

    @cached_property
    def takes_tools(self) -> bool:
        """Return whether the template writes tools that it is given."""
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
        return self._writes(Conversation([_HELLO], [tool]), add_generation_prompt=True)

    def normalized(self, messages: Iterable[Message]) -> list[Message]:
        """Return messages of OpenAI's form as this template reads them.

        Parts become one text, a developer is the system, and an assistant's calls have the form of their arguments,
        and of no content, that the template does not refuse or leave out. Raises InputError for arguments that are no
        JSON object, for calls where the template writes none, and for results without a call.
        """
        known: set[Any] = set()  # ids of tool calls
        normalized = []
        for i, message in enumerate(messages):
            normalized.append(self._normalized(i, message))
            if message["role"] == "tool" and message.get("tool_call_id") not in known:
                raise InputError(f"messages[{i}] is the result of a tool call that no message has", "messages")
            known |= {call.get("id") for call in normalized[-1].get("tool_calls", ())}
        return normalized

    def _normalized(self, i: int, message: Message) -> Message:
        found = dict(message)
        content = found.get("content")
        if found["role"] == "developer" and "developer" not in self.source:
            found["role"] = "system"
        if content is not None and not isinstance(content, str):
            found["content"] = "\n".join(part["text"] for part in content)
        calls = found.pop("tool_calls", None)
        if not calls:
            return found
        form = self._call_form
        if form is None:
            raise InputError(f"messages[{i}] has tool_calls, which this model's template does not write", "messages")
        without_content, as_object = form
        if not found.get("content"):
            found["content"] = without_content
        found["tool_calls"] = [_call(f"messages[{i}].tool_calls[{k}]", call, as_object) for k, call in enumerate(calls)]
        return found

    @cached_property
    def _call_form(self) -> tuple[str | None, bool] | None:
        """What stands for no content beside tool calls, and whether arguments are an object, else JSON; None where the
        template writes no calls.
        """
        for without_content in ("", None):
            for as_object in (True, False):
                calls = _tool_calls({"text": _PROBE} if as_object else json.dumps({"text": _PROBE}))
                answer = {"role": "assistant", "content": without_content, "tool_calls": calls}
                if self._writes(Conversation([_HELLO, answer]), add_generation_prompt=False):
                    return without_content, as_object
        return None

    def _writes(self, conversation: Conversation, add_generation_prompt: bool) -> bool:
        try:
            return _PROBE in self._render(conversation, add_generation_prompt, str)
        except InputError:
            return False

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self._tokenizer)

    def _render(self, conversation: Conversation, add_generation_prompt: bool | None, mark: Mark) -> str:
        continues = conversation.continue_final_message
        if add_generation_prompt is None:
            add_generation_prompt = not continues
        messages = [_marked_message(message, mark) for message in conversation.messages]
        if continues:
            final = _tagged(messages, add_generation_prompt)
        variables = {
            "messages": messages,
            "tools": None if conversation.tools is None else _marked(list(conversation.tools), mark),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **_marked(dict(conversation.template_arguments), mark),
        }
        try:
            answer = self._process.ask(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the conversation cannot be written as JSON: {error}", "messages") from error
        if "text" not in answer:
            raise InputError(f"the chat template fails: {answer['error']}", "messages")
        text = answer["text"]
        return _cut(text, final) if continues else text


_PROBE = "probe0of0the0template"
_HELLO = {"role": "user", "content": "Hello"}


def _tool_calls(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "call00000", "type": "function", "function": {"name": "call", "arguments": arguments}}]


def _call(where: str, call: Any, as_object: bool) -> Mapping[str, Any]:
    """Return a tool call with its arguments in one form. Raises InputError."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has no function with a name", "messages")
    arguments = function.get("arguments") or {}
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, Mapping):
        raise InputError(f"{where}.function.arguments is no JSON object", "messages")
    given = arguments if isinstance(arguments, str) else json.dumps(value, ensure_ascii=False)
    return {"type": "function", **call, "function": {**function, "arguments": value if as_object else given}}


def _marked_message(message: Message, mark: Mark) -> dict[str, Any]:
    """Return a message as templates see it: without fields of null, its reasoning under every name, its text marked.

    What the assistant said itself is not marked, but for its tool calls.
    """
    own = ("content", *_REASONING) if message["role"] == "assistant" else ()
    found = {
        name: value if name in own or name == "role" else _marked(value, mark)
        for name, value in message.items()
        if value is not None
    }
    if (reasoning := next((found[name] for name in _REASONING if name in found), None)) is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _marked(value: Any, mark: Mark, depth: int = 0) -> Any:
    """Return a value with a function applied to all its strings. Raises InputError for one nested too deeply."""
    if depth > _MAX_DEPTH:
        raise InputError(f"lists and mappings are more than {_MAX_DEPTH} deep in one another", "messages")
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        names = [mark(name) if isinstance(name, str) else name for name in value]
        return dict(zip(names, [_marked(item, mark, depth + 1) for item in value.values()], strict=True))
    if isinstance(value, list | tuple):
        return [_marked(item, mark, depth + 1) for item in value]
    return value


def _tagged(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Write a tag behind the text of the last message, and return that text. Raises InputError."""
    if add_generation_prompt:
        raise InputError("continue_final_message and add_generation_prompt exclude each other", "add_generation_prompt")
    final = messages[-1].get("content")
    if isinstance(final, str):
        messages[-1]["content"] = f"{final}{_CONTINUE} "
        return final
    parts = messages[-1]["content"] = [dict(part) for part in final or ()]
    if not parts:
        raise InputError("continue_final_message: the last message has no text", "continue_final_message")
    text: str = parts[-1]["text"]
    parts[-1]["text"] = f"{text}{_CONTINUE} "
    return text


def _cut(text: str, final: str) -> str:
    """Return a rendered conversation up to the tag. Raises InputError where the template did not write it."""
    if final.strip() not in text or _CONTINUE not in text:
        raise InputError(
            "continue_final_message: the template does not keep the last message", "continue_final_message"
        )
    at = text.rindex(_CONTINUE)
    return text[:at] if text.startswith(f"{_CONTINUE} ", at) else text[:at].rstrip()


def _absent_character(source: str, conversation: Conversation) -> str:
    """Return a character that neither template nor conversation contains. Raises InputError.

    It is a letter without case (CJK Extension B), so that no function of a template changes it or escapes it.
    """
    present = set(source)
    _marked([list(conversation.messages), conversation.tools, conversation.template_arguments], present.update)
    found = next((character for code in _LETTERS if (character := chr(code)) not in present), None)
    if found is None:
        raise InputError(f"the messages contain all of the {len(_LETTERS):,} letters from U+20000 on", "messages")
    return found


_LETTERS = range(0x20000, 0x2A6E0)


def chat_generate(generate: Generate | None, keywords: Mapping[str, Any]) -> Generate:
    """Return the options of an answer, from an object or from keywords, which may have other fields too."""
    if generate is None:
        keywords = {"max_new_tokens": MAX_NEW_TOKENS, **keywords}
    return chosen(Generate, generate, keywords)


def chat_prompt(template: ChatTemplate, messages: Messages, generate: Generate) -> tuple[list[int], Generate]:
    """Return the token ids of a conversation, and options by which an answer ends with the assistant's turn.

    messages  of OpenAI's form, see `ChatTemplate.normalized`

    Raises InputError.
    """
    conversation = messages if isinstance(messages, Conversation) else Conversation(messages)
    if conversation.tools and not template.takes_tools:
        raise InputError("the chat template of this model writes no tools: leave them out", "tools")
    ids = template.encode(replace(conversation, messages=template.normalized(conversation.messages)))

    def ended(sampling: Sampling) -> Sampling:
        if not isinstance(sampling, Sampling) or sampling.ignore_eos:
            return sampling
        return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *template.stop_token_ids))

    sampling = generate.sampling
    ending = [ended(each) for each in sampling] if is_sequence(sampling) else ended(cast(Sampling, sampling))
    return ids, replace(generate, sampling=ending)


def load_chat_template(file: Path, tokenizer: Any) -> ChatTemplate:
    """Return the template of a file. Raises ManifestError for one that is too large or not valid, DependencyError."""
    if file.stat().st_size > MAX_TEMPLATE:
        raise ManifestError(f"{file} has more than {MAX_TEMPLATE:,} bytes")
    try:
        return ChatTemplate(file.read_text("utf-8"), tokenizer)
    except (UnicodeDecodeError, ManifestError) as error:
        raise ManifestError(f"{file}: {error}") from error
