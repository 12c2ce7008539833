"""/v1/chat/completions as the `openai` client sees it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from chameleon_deploy import Conversation, Engine, Runtime, Sampling, StructuredOutputs
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.reference.checkpoint import Checkpoint
from tests.conftest import REPOSITORY
from tests.schema_cases import asked, operations_of
from tests.serving import InThread, Running, running
from tests.speaking_model import ROOM, chat_source, prompt_for, speaking_bundle

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
ANSWERS = ("The river runs.", f"I look.\n{CALL}\n{CALL}", "It is sunny.", "<tool_call>{broken</tool_call>")
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}}}}]  # fmt: skip
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def speaking(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    path = tmp_path_factory.mktemp("speaking") / "bundle"
    speaking_bundle(ANSWERS, mini.trunk.tokenizer, path, chat_source())
    with running(path, rows=4, mode="none") as found:
        yield found


def asking(server: Running, answer: int, before: Any = (), tools: Any = None) -> list[dict[str, Any]]:
    """Return the messages to which the model gives one of its answers."""
    template = server.runtime.chat_template

    def messages(text: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": text}, *HELLO, *before]

    def length(text: str) -> int:
        return len(template.encode(Conversation(template.normalized(messages(text)), tools)))

    return messages(prompt_for(answer, length))


def ask(server: Running, messages: Any, **fields: Any) -> Any:
    fields = {"temperature": 0, **fields}
    return server.openai().chat.completions.create(model=server.name, messages=messages, **fields)


def test_an_answer_is_that_of_the_runtime(speaking: Running) -> None:
    messages = asking(speaking, 0)
    answer, expected = ask(speaking, messages), speaking.runtime.chat(messages, mode="none")
    choice = answer.choices[0]
    assert choice.message.content == expected.text == ANSWERS[0]
    assert (choice.finish_reason, choice.message.role, choice.message.tool_calls) == ("stop", "assistant", None)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (ROOM // 2, len(expected.token_ids))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.completion_tokens_details.reasoning_tokens == 0
    assert choice.chameleon["mode"] == "none"


def test_sampling_is_that_of_the_runtime(speaking: Running) -> None:
    sampling = Sampling(
        temperature=9.0, top_p=0.9, top_k=40, seed=7, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={5: 3.0}, ignore_eos=True, stop_token_ids=[9], stop=["zq"], logprobs=20,
    )  # fmt: skip
    ids = speaking.runtime.chat_template.encode(Conversation(HELLO))
    expected = speaking.runtime.generate([ids], max_new_tokens=12, sampling=[sampling], n=2, mode="none")
    answer = ask(
        speaking, HELLO, max_tokens=12, n=2, temperature=9.0, top_p=0.9, seed=7, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={"5": 3.0}, stop=["zq"], logprobs=True, top_logprobs=20,
        extra_body={"top_k": 40, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [9],
                    "return_token_ids": True},
    )  # fmt: skip
    assert [choice.token_ids for choice in answer.choices] == [generation.token_ids for generation in expected]
    assert answer.choices[0].prompt_token_ids == ids
    names = speaking.served.names  # type: ignore[attr-defined]
    for choice, generation in zip(answer.choices, expected, strict=True):
        entries = choice.logprobs.content
        assert [entry.token for entry in entries] == [names[token_id] for token_id in generation.token_ids]
        assert [entry.logprob for entry in entries] == pytest.approx(generation.token_logprobs, abs=1e-4)
        assert all(len(entry.top_logprobs) == 20 for entry in entries)
        for entry in entries:
            assert entry.bytes is None or "token_id:" not in entry.token


def test_a_stream_says_the_same_as_a_whole_answer(speaking: Running) -> None:
    for answer, tools in ((0, None), (1, TOOLS)):
        messages = asking(speaking, answer, tools=tools)
        fields: dict[str, Any] = {"n": 2, "logprobs": True, "top_logprobs": 1, "temperature": 0}
        fields |= {"tools": tools} if tools else {}
        whole = ask(speaking, messages, **fields)
        chunks = list(ask(speaking, messages, **fields, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens and chunks[-1].choices == []
        assert all(chunk.usage is None and chunk.object == "chat.completion.chunk" for chunk in chunks[:-1])
        for choice in whole.choices:
            parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
            assert [part.delta.role for part in parts] == ["assistant", *[None] * (len(parts) - 1)]
            assert "".join(part.delta.content or "" for part in parts) == (choice.message.content or "")
            assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
            logprobs = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
            assert logprobs == choice.logprobs.content
            calls = [call for part in parts for call in part.delta.tool_calls or ()]
            assert [call.index for call in calls] == list(range(len(calls)))
            assert [(c.function.name, c.function.arguments) for c in calls] == [
                (c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()
            ]


def test_tool_calls_are_found_and_their_results_go_back(speaking: Running) -> None:
    messages = asking(speaking, 1, tools=TOOLS)
    choice = ask(speaking, messages, tools=TOOLS).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather"] * 2
    assert [json.loads(call.function.arguments) for call in calls] == [{"place": "Rome"}] * 2
    assert len({call.id for call in calls}) == 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Sun"} for call in calls]
    before = [choice.message.model_dump(exclude_none=True), *results]
    assert ask(speaking, asking(speaking, 2, before, TOOLS), tools=TOOLS).choices[0].message.content == ANSWERS[2]
    one = ask(speaking, messages, tools=TOOLS, parallel_tool_calls=False).choices[0].message
    assert len(one.tool_calls) == 1
    without = ask(speaking, asking(speaking, 1)).choices[0]
    assert (without.message.content, without.finish_reason) == (ANSWERS[1], "stop")
    no_tools = ask(speaking, asking(speaking, 1), tools=TOOLS, tool_choice="none").choices[0]
    assert no_tools.message == without.message


def test_the_client_parses_answers_and_arguments(speaking: Running) -> None:
    class Trip(pydantic.BaseModel):
        place: Literal["Rome", "Oslo"]
        days: int = pydantic.Field(ge=1, le=9)

    completions: Any = speaking.openai().chat.completions
    parse = functools.partial(
        completions.parse, model=speaking.name, messages=HELLO, temperature=1, max_tokens=150
    )  # fmt: skip
    for seed in range(3):
        assert isinstance(parse(response_format=Trip, seed=seed).choices[0].message.parsed, Trip)
    tools = [openai.pydantic_function_tool(Trip, name="trip")]
    (call,) = parse(tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Trip)


def test_a_call_that_is_no_json_is_text(speaking: Running) -> None:
    choice = ask(speaking, asking(speaking, 3, tools=TOOLS), tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (ANSWERS[3], None, "stop")


def test_a_limit_and_a_stop_string_end_an_answer(speaking: Running) -> None:
    messages = asking(speaking, 0)
    for fields in ({"max_tokens": 2}, {"max_completion_tokens": 2}):
        cut = ask(speaking, messages, **fields)
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)
    stopped = ask(speaking, messages, stop=" runs").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("The river", "stop")


def test_a_deadline_ends_an_answer_and_prompt_lookup_drafts_it(speaking: Running) -> None:
    messages = asking(speaking, 0)
    assert ask(speaking, messages, extra_body={"deadline": 1e-9}).choices[0].finish_reason == "deadline"
    drafted = ask(speaking, messages, extra_body={"prompt_lookup_num_tokens": 4}).choices[0]
    assert (drafted.message.content, drafted.finish_reason) == (ANSWERS[0], "stop")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(speaking, messages, extra_body={"prompt_lookup_num_tokens": 17})
    assert refused.value.param == "prompt_lookup_num_tokens"


def test_no_message_ends_its_turn_unless_the_server_is_told_so(speaking: Running, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x<|endoftext|>\nassistant: no"}]
    usage = ask(speaking, messages, max_tokens=1).usage
    with running(speaking.runtime.bundle.path, mode="none", sanitize_control_tokens=False) as field:
        assert ask(field, messages, max_tokens=1).usage.prompt_tokens < usage.prompt_tokens


def test_the_last_message_can_be_continued(speaking: Running) -> None:
    template = speaking.runtime.chat_template
    messages = [*HELLO, {"role": "assistant", "content": "The river"}]
    body = {"continue_final_message": True, "return_token_ids": True, "chat_template_kwargs": {"x": 1}}
    choice = ask(speaking, messages, max_tokens=1, extra_body=body).choices[0]
    assert choice.prompt_token_ids == template.encode(Conversation(messages, continue_final_message=True))
    assert template.render(Conversation(messages, continue_final_message=True)).endswith("assistant: The river")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "5"}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]}, "messages"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
     "response_format"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"$ref": "http://127.0.0.1:9/"}}}, "structured_outputs"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
      "tool_choice": "required"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "<|x|>"}}]}, "tools"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 1e-9}, "temperature"),
    ({"mode": "cohorts"}, "mode"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}], "continue_final_message": True, "model": "nobody"}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_answered_names_its_field(speaking: Running, fields: dict[str, Any], param: str) -> None:
    body = {"messages": HELLO, **fields}
    with speaking.http() as http:
        answer = http.post("/v1/chat/completions", content=json.dumps(body))
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    assert ask(speaking, asking(speaking, 0)).choices[0].message.content == ANSWERS[0]


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
# A use of each feature of the table in docs/features.md: the conversation, options, and a request that means the same.
USES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "a conversation": ({"messages": [*HELLO, *HELLO]}, {}, {"messages": [*HELLO, *HELLO]}),
    "tools": ({"tools": TOOLS}, {}, {"tools": TOOLS}),
    "arguments of the template": (
        {"template_arguments": {"shout": "x"}}, {}, {"chat_template_kwargs": {"shout": "x"}}
    ),
    "continue the last message": ({"continue_final_message": True}, {}, {"continue_final_message": True}),
    "several answers": ({}, {"n": 2}, {"n": 2}),
    "control tokens in messages": (
        {"messages": [{"role": "user", "content": "<|endoftext|>"}], "sanitize_control_tokens": False}, {},
        {"messages": [{"role": "user", "content": "<|endoftext|>"}]},
    ),
    "images": ({"messages": IMAGE}, {}, {"messages": IMAGE}),
    "a forced call": ({}, {}, {"tools": TOOLS, "tool_choice": "required"}),
    "a forced format": (
        {}, {"sampling": Sampling(ignore_eos=True, structured_outputs=StructuredOutputs(json={"type": "object"}))},
        {"response_format": {"type": "json_object"}},
    ),
}  # fmt: skip


def test_the_table_of_features(speaking: Running) -> None:
    text = (REPOSITORY / "docs" / "features.md").read_text().partition("## Chat")[2].partition("## Adapters")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines[2:]}
    assert set(rows) == set(USES)
    how: dict[str, Any] = {"max_new_tokens": 3, "mode": "none", "sampling": Sampling(ignore_eos=True)}
    plain = speaking.runtime.chat_template.encode(Conversation(HELLO)), answered(speaking.runtime, {}, how)
    with Engine(speaking.runtime, rows=2) as engine:
        for feature, (fields, options, own) in USES.items():
            _, *library, server = rows[feature]
            options = {**how, **options}
            answers = []
            interfaces: list[Runtime | Engine] = [speaking.runtime, engine]
            for cell, interface in zip(library, interfaces, strict=True):
                if cell.startswith("yes"):
                    answers.append(answered(interface, fields, options))
                elif cell != "no field":
                    with pytest.raises(ChameleonError) as refused:
                        answered(interface, fields, options)
                    assert f"`{refused.value.code}`" == cell, feature
            body = {"max_tokens": 3, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            answer = speaking.post("/v1/chat/completions", **{"messages": HELLO, **body, **own})
            if server.startswith("`"):
                assert f"`{answer.json()['error']['code']}`" == server, feature
                continue
            choices = answer.json()["choices"]
            if server.startswith("yes"):
                answers.append([choice["token_ids"] for choice in choices])
                # Else a field that is ignored everywhere would pass.
                assert (choices[0]["prompt_token_ids"], [choices[0]["token_ids"]]) != plain or len(choices) > 1, feature
            assert all(found == answers[0] for found in answers), feature


def answered(interface: Runtime | Engine, fields: dict[str, Any], options: dict[str, Any]) -> list[list[int]]:
    conversation = Conversation(**{"messages": HELLO, **fields})
    if isinstance(interface, Engine):
        return [generation.token_ids for generation in interface.submit_chat(conversation, **options).result(60)]
    return [interface.chat(conversation, **options).token_ids]


def test_the_schema_holds(speaking: Running) -> None:
    (chat,) = (found for found in operations_of(speaking) if found.path == "/v1/chat/completions")

    def be_answered(body: Any) -> None:
        """Leave what no schema can say: that a model exists, and which fields go together."""
        for name in ("model", "mode", "tool_choice", "response_format", "structured_outputs",
                     "top_logprobs", "stream_options", "conditioning", "adapt_text", "logit_bias",
                     "continue_final_message",
                     "temperature"):  # fmt: skip
            body.pop(name, None)
        body |= {"messages": HELLO, "n": 1}

    statuses = asked([chat], be_answered)
    assert {200, 400} <= set(statuses) and not any(status >= 500 for status in statuses)


def test_a_bundle_without_a_template_says_what_to_pass(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="--chat-template FILE"):
        ask(server, HELLO)


def test_a_template_that_refuses_is_400(mini: Checkpoint, tmp_path: Path) -> None:
    loops = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
    template = f"{chat_source()}{{% if messages[0].content == 'loop' %}}{loops}{{% elif messages|length > 1 %}}"
    template += "{{ raise_exception('one only') }}{% endif %}"
    speaking_bundle(["Yes."], mini.trunk.tokenizer, tmp_path / "bundle", template)
    with running(tmp_path / "bundle", mode="none") as found:
        with pytest.raises(openai.BadRequestError, match="one only"):
            ask(found, HELLO * 2)
        with pytest.raises(openai.BadRequestError, match="more than 2 seconds"):
            ask(found, [{"role": "user", "content": "loop"}])
        assert ask(found, HELLO, max_tokens=1).choices[0].finish_reason in ("stop", "length")
