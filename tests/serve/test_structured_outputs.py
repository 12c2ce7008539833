"""Forced formats and forced calls over HTTP, as the `openai` client sees them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import jsonschema_rs
import pytest

from chameleon_deploy import Sampling, StructuredOutputs
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.runtime import structured_outputs
from chameleon_deploy.runtime.chat.tool_calls import ToolCallParser, calls_grammar, family_of
from tests.serving import InThread, Running, running
from tests.speaking_model import chat_source, speaking_bundle

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer",
          "minimum": 1, "maximum": 9}}, "required": ["place", "days"], "additionalProperties": False}  # fmt: skip
NESTED = {"type": "object", "properties": {"unit": {"$ref": "#/$defs/unit"}}, "required": ["unit"],
          "additionalProperties": False, "$defs": {"unit": {"enum": ["K", "C"]}}}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "scale", "parameters": NESTED}},
    {"type": "function", "function": {"name": "now"}},
]
KINDS = [
    ({"regex": "[ab]{2,5}"}, "[ab]{2,5}"), ({"choice": ["yes", "no"]}, "yes|no"),
    ({"grammar": 'start: "(" inner ")"\ninner: "x" | "[" inner "]"'}, r"\(\[*x\]*\)"),
]  # fmt: skip
# What a template writes of calls, which shows the family of its model.
FAMILIES = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "named mistral": "[TOOL_CALLS][ARGS]", "llama": "call"}


@pytest.fixture(scope="module")
def servers(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, InThread]]:
    directory, found = tmp_path_factory.mktemp("families"), dict[str, InThread]()
    with ExitStack() as stack:
        for family, words in FAMILIES.items():
            path = directory / family.replace(" ", "_")
            speaking_bundle(["Yes."] * 3, mini.trunk.tokenizer, path, chat_source(words))
            found[family] = stack.enter_context(running(path, rows=4, mode="none"))
        yield found


@pytest.fixture(scope="module")
def speaking(servers: dict[str, InThread]) -> InThread:
    return servers["hermes"]


def ask(server: Running, **fields: Any) -> Any:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 150, **fields}
    return server.openai().chat.completions.create(model=server.name, messages=HELLO, **fields)


def complete(server: Running, **fields: Any) -> Any:
    fields = {"temperature": 1.0, "seed": 1, "max_tokens": 100, "prompt": "The river", **fields}
    return server.openai().completions.create(model=server.name, **fields)


@pytest.mark.parametrize(("outputs", "pattern"), KINDS)
def test_vllms_field_in_both_endpoints_whole_and_streamed(
    speaking: Running, outputs: dict[str, Any], pattern: str
) -> None:
    body = {"structured_outputs": outputs}
    chat, text = ask(speaking, extra_body=body).choices[0], complete(speaking, extra_body=body).choices[0]
    assert re.fullmatch(pattern, chat.message.content) and chat.finish_reason == "stop"
    assert re.fullmatch(pattern, text.text) and text.finish_reason == "stop"
    parts = [part for chunk in ask(speaking, extra_body=body, stream=True) for part in chunk.choices]
    assert "".join(part.delta.content or "" for part in parts) == chat.message.content
    chunks = [part for chunk in complete(speaking, extra_body=body, stream=True) for part in chunk.choices]
    assert "".join(part.text for part in chunks) == text.text
    (expected,) = speaking.runtime.generate(
        ["The river"], max_new_tokens=100, mode="none",
        sampling=[Sampling(1.0, seed=1, structured_outputs=StructuredOutputs(**outputs))],
    )  # fmt: skip
    assert text.text == expected.text


def test_response_formats(speaking: Running) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        chat = ask(speaking, response_format=schema, seed=seed, n=2)
        answers = [choice.message.content for choice in chat.choices]
        answers.append(complete(speaking, seed=seed, extra_body={"response_format": schema}).choices[0].text)
        for answer in answers:
            jsonschema_rs.validate(SCHEMA, json.loads(answer))
    text = ask(speaking, response_format={"type": "text"}, temperature=0, max_tokens=5).choices[0].message.content
    assert text == ask(speaking, temperature=0, max_tokens=5).choices[0].message.content
    free = ask(speaking, response_format={"type": "json_object"}, max_tokens=20, logit_bias={"93": 50})
    assert isinstance(json.loads(free.choices[0].message.content), dict)


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_calls(servers: dict[str, InThread], family: str) -> None:
    server = servers[family]
    named = {"type": "function", "function": {"name": "scale"}}
    schemas: dict[str, Any] = {"weather": SCHEMA, "scale": NESTED, "now": {"maxProperties": 0}}
    seen = set()
    for seed in range(6):
        for choice in ("required", named):
            fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "temperature": 4.0}
            if seed % 2:
                fields["parallel_tool_calls"] = False
            answer = ask(server, max_tokens=250, **fields).choices[0]
            if answer.finish_reason == "length":  # a model of random weights may go on calling
                assert choice == "required" and not seed % 2
                continue
            calls = answer.message.tool_calls
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            assert len(calls) == 1 or (choice == "required" and not seed % 2)
            for call in calls:
                jsonschema_rs.validate(schemas[call.function.name], json.loads(call.function.arguments))
                assert choice == "required" or call.function.name == "scale"
                seen.add(call.function.name)
            if len(calls) == 1:
                chunks = ask(server, max_tokens=250, stream=True, **fields)
                streamed = [c for chunk in chunks for part in chunk.choices for c in part.delta.tool_calls or ()]
                assert [(c.function.name, c.function.arguments) for c in streamed] == [
                    (c.function.name, c.function.arguments) for c in calls
                ]
    assert seen >= {"scale"} and len(seen) > 1


def test_an_answer_that_a_limit_ends_is_no_call(speaking: Running) -> None:
    choice = ask(speaking, tools=TOOLS, tool_choice="required", max_tokens=4).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)


@pytest.mark.parametrize("words", FAMILIES.values())
def test_a_forced_call_is_what_the_parser_reads(speaking: Running, words: str) -> None:
    """Without the parser's help, from the grammar alone."""
    family, tokenizer = family_of(chat_source(words)), speaking.runtime.tokenizer
    grammar = calls_grammar(family, {"weather": SCHEMA, "now": None}, True, tokenizer)
    sampling = [Sampling(1.5, seed=i, structured_outputs=StructuredOutputs(grammar=grammar)) for i in range(8)]
    ended = 0
    for row in speaking.runtime.generate(["A"] * 8, max_new_tokens=200, sampling=sampling, mode="none"):
        parser = ToolCallParser(family)
        found = [*parser.feed(row.text), *parser.finish()]
        if row.finish_reason == "stop":
            assert found and not any(isinstance(part, str) and part.strip() for part in found), row.text
            ended += 1
    assert ended


def test_a_schema_that_compiles_slowly_holds_up_nobody(speaking: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered while one compiles, whose thread waits here for just that."""
    compiling, go_on = threading.Event(), threading.Event()
    compile_ = structured_outputs.Grammars._compile

    def slowly(self: structured_outputs.Grammars, outputs: StructuredOutputs) -> Any:
        if outputs.regex == "slow":
            compiling.set()
            assert go_on.wait(60)
        return compile_(self, outputs)

    monkeypatch.setattr(structured_outputs.Grammars, "_compile", slowly)
    known = {"structured_outputs": {"choice": ["known"]}}
    assert complete(speaking, extra_body=known).choices[0].text == "known"
    answers: list[Any] = []
    body = {"structured_outputs": {"regex": "slow"}}
    asking = [
        threading.Thread(target=lambda: answers.append(ask(speaking, extra_body=body).choices[0].message.content)),
        threading.Thread(target=lambda: answers.append(complete(speaking, extra_body=body).choices[0].text)),
    ]
    for thread in asking:
        thread.start()
    assert compiling.wait(60)
    assert complete(speaking, max_tokens=2).choices[0].text is not None
    assert ask(speaking, max_tokens=2).choices[0].message.content is not None
    for _ in range(20):  # more than there are threads, had they to wait
        assert complete(speaking, extra_body=known).choices[0].text == "known"
    assert ask(speaking, extra_body=known).choices[0].message.content == "known"
    assert not answers
    go_on.set()
    for thread in asking:
        thread.join(60)
    assert answers == ["slow", "slow"]
