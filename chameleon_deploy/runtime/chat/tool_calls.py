"""Tool calls in what a model writes. Families write them differently; a template shows which one a model is of."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from chameleon_deploy.runtime.structured_outputs import JSON_FORM

_LETTERS = string.ascii_letters + string.digits


def _new_id() -> str:
    """Return nine letters and digits: Mistral's templates take no other ids."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for.

    arguments  a JSON object
    id         unique
    """

    name: str
    arguments: str
    id: str = field(default_factory=_new_id)


class Form(NamedTuple):
    one: str = "function"
    between: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Family:
    """How a family of models writes tool calls.

    read        from the text of some calls to them; raises ValueError, KeyError or TypeError for text that is none
    begin, end  around that text; without an end it reaches to the end of the answer, and without a beginning it begins
                the answer, with a brace
    form        of one call, of what is between two and around all, in Lark with the rules of `calls_grammar`
    key         of the arguments in the object of a call; None where a call is no object
    """

    read: Callable[[str], list[ToolCall]]
    form: Form
    begin: str | None = None
    end: str | None = None
    key: str | None = "arguments"


def _json(text: str) -> Any:
    return json.loads(text, strict=False, parse_constant=_no_constant)  # models write line breaks in strings


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _call(found: Any) -> ToolCall:
    arguments = found["arguments"] if "arguments" in found else found["parameters"]
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(found["name"], str) or not found["name"] or not isinstance(arguments, dict):
        raise TypeError
    return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False))


def _one(text: str) -> list[ToolCall]:
    return [_call(_json(text))]


def _in_a_row(text: str) -> list[ToolCall]:
    """Read objects one after the other, which semicolons may part."""
    text = text.removeprefix(PYTHON_TAG)
    decoder, calls, at = json.JSONDecoder(strict=False, parse_constant=_no_constant), [], 0
    while at < len(text):
        found, at = decoder.raw_decode(text, at)
        calls.append(_call(found))
        at += len(text[at:]) - len(text[at:].lstrip("; \n"))
    return calls


def _list_or_named(text: str) -> list[ToolCall]:
    """Read a list of calls, or names with arguments behind them."""
    if text.startswith("["):
        return [_call(found) for found in _json(text)]
    calls = []
    for part in text.split(TOOL_CALLS):
        name, brace, rest = part.partition("{")
        calls.append(_call({"name": name.removesuffix(ARGUMENTS).strip(), "arguments": brace + rest}))
    return calls


PYTHON_TAG, TOOL_CALLS, ARGUMENTS = "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"
HERMES = Family(_one, Form(r'begin "\n" function "\n" end', r'"\n"'), "<tool_call>", "</tool_call>")  # and Qwen
LLAMA = Family(_in_a_row, Form(between='"; "'), key="parameters")
MISTRAL = Family(_list_or_named, Form(between='", "', before='begin " "? "["', after='"]"'), TOOL_CALLS)
NAMED_MISTRAL = Family(_list_or_named, Form("begin function"), TOOL_CALLS, key=None)


def family_of(template: str) -> Family:
    """Return the family whose calls a template writes in the history; where it shows none, that of plain JSON."""
    if ARGUMENTS in template:
        return NAMED_MISTRAL
    return next((family for family in (HERMES, MISTRAL) if family.begin and family.begin in template), LLAMA)


def calls_grammar(family: Family, functions: Mapping[str, Any], several: bool, tokenizer: Any) -> str:
    """Return a grammar, in Lark, of answers that are calls of these functions.

    functions  names with the JSON schemas of their arguments; None takes none
    several    allow more than one call

    Raises InputError for a schema that is no object.
    """
    one, between, before, after = family.form
    marks = {"begin": family.begin, "end": family.end, "args": ARGUMENTS}
    rules = [f"start: {before} {one} {f'({between} {one})*' if several else ''} {after}"]
    rules += [f"{name}: {_mark(text, tokenizer)}" for name, text in marks.items() if text]
    rules.append("function: " + " | ".join(f"function{i}" for i in range(len(functions))))
    for i, (name, schema) in enumerate(functions.items()):
        if family.key is None:
            rules.append(f"function{i}: {json.dumps(name)} args arguments{i}")
        else:
            opening = f'{{"name": {json.dumps(name)}, "{family.key}": '
            rules.append(f'function{i}: {json.dumps(opening)} arguments{i} "}}"')
        schema = _NOTHING if schema is None else {"type": "object", **schema}
        rules.append(f"arguments{i}: %json {json.dumps({**schema, 'x-guidance': JSON_FORM})}")
    return "\n".join(["%llguidance {}", *rules])


_NOTHING = {"type": "object", "additionalProperties": False}


def _mark(text: str, tokenizer: Any) -> str:
    """Return a mark in Lark: as one token where the tokenizer has it."""
    token_id = tokenizer.token_to_id(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def hidden_marks(tokenizer: Any) -> dict[int, str]:
    """Return special tokens that mark tool calls, by id: text that is decoded is without them."""
    added = tokenizer.get_added_tokens_decoder().items()
    marks = (PYTHON_TAG, TOOL_CALLS, ARGUMENTS, HERMES.begin, HERMES.end)
    return {token_id: token.content for token_id, token in added if token.special and token.content in marks}


class ToolCallParser:
    """Splits an answer into text and tool calls, as it arrives. What looks like a call and is none stays text."""

    def __init__(self, family: Family) -> None:
        self._family, self._held = family, ""
        self._in_call = False
        self._may_begin = True  # without a mark, only the answer's beginning is that of a call

    def feed(self, text: str) -> list[str | ToolCall]:
        """Return what is certain by now. Spaces before a call belong to it."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[str | ToolCall]:
        """Return the rest."""
        held, self._held = self._held, ""
        return (self._calls(held) if self._in_call else [held]) if held else []

    def _step(self, found: list[str | ToolCall]) -> bool:
        """Take one part of the held text; return whether another may follow."""
        family = self._family
        if self._in_call:
            if family.end is None or (at := self._held.find(family.end)) < 0:
                return False
            at += len(family.end)
            found += self._calls(self._held[:at])
            self._held, self._in_call = self._held[at:], False
            return True
        begins = self._beginning()
        self._in_call = begins is not None
        keep = self._certain() if begins is None else len(self._held[:begins].rstrip())
        if keep:
            found.append(self._held[:keep])
            self._held = self._held[keep:]
        return self._in_call

    def _beginning(self) -> int | None:
        """Return where a call begins."""
        if self._family.begin is not None:
            at = self._held.find(self._family.begin)
            return at if at >= 0 else None
        return 0 if self._may_begin and self._held.lstrip().startswith(("{", PYTHON_TAG)) else None

    def _certain(self) -> int:
        """Return how much of the held text, in which no call begins, is text of the answer."""
        begin = self._family.begin
        if begin is None:
            start = self._held.strip()
            self._may_begin = self._may_begin and PYTHON_TAG.startswith(start)
            return 0 if self._may_begin else len(self._held)
        partial = next((k for k in range(len(begin) - 1, 0, -1) if self._held.endswith(begin[:k])), 0)
        return len(self._held[: len(self._held) - partial].rstrip())

    def _calls(self, text: str) -> list[str | ToolCall]:
        family, inner = self._family, text.strip()
        inner = inner.removeprefix(family.begin or "").removesuffix(family.end or "").strip()
        try:
            return [*family.read(inner)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return [text]
