"""/v1/responses as the `openai` client sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chameleon_deploy.reference.checkpoint import Checkpoint
from tests.schema_cases import asked, operations_of
from tests.serving import InThread, running
from tests.speaking_model import chat_source, speaking_bundle, system_for

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
TOOLS: Any = [{"type": "function", **FUNCTION}]
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def speaking(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    path = tmp_path_factory.mktemp("speaking") / "bundle"
    says = ["The river runs.", f"I look.\n{CALL}\n{CALL}", "It is sunny."]
    speaking_bundle(says, mini.trunk.tokenizer, path, chat_source())
    with running(path, rows=4, mode="none") as found:
        yield found


def create(server: InThread, answer: int, messages: Any = (HELLO,), **fields: Any) -> Any:
    """Ask with instructions to which the model gives one of its answers. messages: of chat, that mean the input"""
    tools = CHAT_TOOLS if "tools" in fields else None
    instructions = system_for(answer, server.runtime.chat_template, messages, tools)
    fields = {"input": "Hello", "temperature": 0, "instructions": instructions, **fields}
    return server.openai().responses.create(model=server.name, **fields)


def test_an_answer(speaking: InThread) -> None:
    answer = create(speaking, 0)
    assert (answer.output_text, answer.status, answer.error) == ("The river runs.", "completed", None)
    instructions = {"role": "system", "content": system_for(0, speaking.runtime.chat_template, [HELLO])}
    chat = speaking.post("/v1/chat/completions", messages=[instructions, HELLO], temperature=0).json()
    assert answer.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert answer.usage.output_tokens == chat["usage"]["completion_tokens"]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    assert create(speaking, 0, input=parts).output_text == answer.output_text
    cut = create(speaking, 0, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_calls_and_their_results(speaking: InThread) -> None:
    answer = create(speaking, 1, tools=TOOLS)
    text, *calls = answer.output
    assert text.content[0].text == "I look."
    expected = ("function_call", "weather", {"place": "Rome"})
    assert [(call.type, call.name, json.loads(call.arguments)) for call in calls] == [expected] * 2
    history = [HELLO, {"role": "assistant", "content": "I look.", "tool_calls": [
        {"id": call.call_id, "function": {"name": "weather", "arguments": call.arguments}} for call in calls]},
        *({"role": "tool", "tool_call_id": call.call_id, "content": "Sun"} for call in calls)]  # fmt: skip
    given = [HELLO, *(item.model_dump(exclude_none=True) for item in answer.output)]
    given += [{"type": "function_call_output", "call_id": call.call_id, "output": "Sun"} for call in calls]
    assert create(speaking, 2, history, tools=TOOLS, input=given).output_text == "It is sunny."


@pytest.mark.parametrize(("answer", "fields"), [(0, {}), (1, {"tools": TOOLS})])
def test_a_stream_tells_the_same(speaking: InThread, answer: int, fields: dict[str, Any]) -> None:
    whole = create(speaking, answer, **fields)
    events = list(create(speaking, answer, stream=True, **fields))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage == whole.usage
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == whole.output_text
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in done] == [item.type for item in last.output] == [item.type for item in whole.output]
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert [event.delta for event in deltas] == [item.arguments for item in last.output if item.type == "function_call"]


def test_log_probabilities_where_they_are_asked_for(speaking: InThread) -> None:
    """Those of chat, by token; the token that ends the turn is no part of the text."""
    instructions = {"role": "system", "content": system_for(0, speaking.runtime.chat_template, [HELLO])}
    chat = speaking.post(
        "/v1/chat/completions", messages=[instructions, HELLO], temperature=0, logprobs=True, top_logprobs=2
    ).json()["choices"][0]["logprobs"]["content"]
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (item,) = create(speaking, 0, **fields).output
    found = [entry.model_dump() for entry in item.content[0].logprobs]
    assert found == chat[: len(found)] and "".join(entry["token"] for entry in found) == "The river runs."
    events = list(create(speaking, 0, stream=True, **fields))
    deltas = [entry for event in events if event.type.endswith("text.delta") for entry in event.logprobs]
    assert [entry.token for entry in deltas] == [entry["token"] for entry in found]
    (plain,) = create(speaking, 0, include=["reasoning.encrypted_content"]).output
    assert plain.content[0].logprobs == []


def test_the_client_follows_a_stream(speaking: InThread) -> None:
    """openai's own accumulator, which is strict about the order of events."""
    instructions = system_for(0, speaking.runtime.chat_template, [HELLO])
    with speaking.openai().responses.stream(
        model=speaking.name, input="Hello", temperature=0, instructions=instructions
    ) as stream:
        assert stream.get_final_response().output_text == "The river runs."


REFUSED = [
    ({"previous_response_id": "x"}, "previous_response_id"), ({"conversation": "x"}, "conversation"),
    ({"background": True}, "background"), ({"input": []}, "input"), ({"input": [{"type": "reasoning"}]}, "input"),
    ({"input": [{"role": "boss", "content": ""}]}, "input"), ({"tools": [{"type": "web"}]}, "tools"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "5"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
    ({"input": "x" * 5000}, "input"), ({"max_output_tokens": 0}, "max_output_tokens"), ({"model": "no"}, "model"),
    ({"adapters": ["nobody"]}, "adapters"), ({"adapters": [{"nobody": 0.5}]}, "adapters"), ({"mode": "static"}, "mode"),
    ({"adapt_text": "answer like a lawyer"}, "adapt_text"), ({"conditioning": [[1.0]]}, "conditioning"),
    ({"text": {"format": {"type": "poem"}}}, "text"), ({"tool_choice": {"type": "function"}}, "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_answered_names_its_field(speaking: InThread, fields: dict[str, Any], param: str) -> None:
    answer = speaking.post("/v1/responses", **{"input": "Hello", **fields})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_the_schema_holds(speaking: InThread) -> None:
    (responses,) = (found for found in operations_of(speaking) if found.path == "/v1/responses")

    def be_answered(body: Any) -> None:
        for name in list(body):
            del body[name]
        body |= {"input": "Hello", "max_output_tokens": 2}

    statuses = asked([responses], be_answered)
    assert {200, 400} <= set(statuses) and not any(status >= 500 for status in statuses)
