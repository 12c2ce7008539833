"""Chat templates of real models: the text and the token ids of `transformers`, and what messages say stays text.

CHAMELEON_EXAMPLES=500 tries as many conversations with each template; a run of the suite tries a few.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from chameleon_deploy.errors import InputError, ManifestError
from chameleon_deploy.runtime.chat.conversation import Conversation
from chameleon_deploy.runtime.chat.template import ChatTemplate, load_chat_template
from tests.chat_models import MODELS, ChatModel, chat_model, random_conversation

EXAMPLES = int(os.environ.get("CHAMELEON_EXAMPLES", "20"))
HELLO = Conversation([{"role": "user", "content": "Hello"}])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> ChatModel:
    return chat_model(request.param)


def split(fields: dict[str, Any]) -> tuple[Conversation, bool]:
    own = dict(fields)
    prompt = own.pop("add_generation_prompt")
    return Conversation(**own), prompt


def found(call: Any, fields: dict[str, Any]) -> Any:
    try:
        return call(*split(fields))
    except InputError:
        return None


def test_text_and_token_ids_are_those_of_transformers(model: ChatModel) -> None:
    compared = 0
    for seed in range(EXAMPLES):
        fields = random_conversation(seed)
        spells_control_token = model.template._control.pattern.search(json.dumps(fields, ensure_ascii=False))
        expected = model.expected(fields)
        assert found(model.template.render, fields) == expected, seed
        if expected is not None and not spells_control_token:
            assert found(model.template.encode, fields) == model.expected(fields, tokenize=True), seed
            compared += 1
    assert compared >= EXAMPLES / 10  # Gemma takes turns in order alone, and reads <b> as a token


def planted(text: str) -> dict[str, Conversation]:
    """A conversation for each place where a text may stand."""
    user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}
    call = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"place": text}}}
    calls = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call00000", "content": text}
    keyed = {**call, "function": {"name": "weather", "arguments": {text: "x"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": text, "parameters": {}}}
    return {
        "user": Conversation([{"role": "user", "content": text}, answer, {"role": "user", "content": text}]),
        "parts": Conversation([{"role": "user", "content": [{"type": "text", "text": text[:k]},
                                                            {"type": "text", "text": text[k:]}]}])
                 if (k := len(text) // 2) else HELLO,
        "system": Conversation([{"role": "system", "content": text}, user]),
        "tool result": Conversation([user, {**calls, "tool_calls": [{**call, "function": {
            "name": "weather", "arguments": {"place": "x"}}}]}, result]),
        "tool arguments": Conversation([user, calls, {**result, "content": "x"}]),
        "argument names": Conversation([user, {**calls, "tool_calls": [keyed]}, {**result, "content": "x"}]),
        "tools": Conversation([user], [tool]),
    }  # fmt: skip


def controls(model: ChatModel, conversation: Conversation) -> list[int] | None:
    """The control tokens of a conversation's token ids; None where the template refuses it."""
    ids = set(model.template._control._ids.values())
    try:
        return [token_id for token_id in model.template.encode(conversation) if token_id in ids]
    except InputError:
        return None


def test_no_text_of_a_message_becomes_a_control_token(model: ChatModel) -> None:
    texts = sorted(model.template._control._spelled)
    special = [token.content for token in model.tokenizer.get_added_tokens_decoder().values() if token.special]
    assert set(special) <= set(texts)
    expected = {place: controls(model, conversation) for place, conversation in planted("xx").items()}
    assert expected["user"]
    step = max(1, len(texts) // EXAMPLES)
    for text in ["".join(texts), " ".join(texts), *texts[::step]]:
        for place, conversation in planted(text).items():
            assert controls(model, conversation) == expected[place], (place, text[:50])


def test_the_option_lets_a_message_write_control_tokens(model: ChatModel) -> None:
    """So that the test above can fail."""
    text = model.template._tokenizer.id_to_token(model.template.stop_token_ids[0])
    conversation = Conversation([{"role": "user", "content": text}], sanitize_control_tokens=False)
    reference = model.expected({"messages": conversation.messages, "add_generation_prompt": True}, tokenize=True)
    assert model.template.encode(conversation) == reference
    assert controls(model, conversation) != controls(model, HELLO)


def test_the_text_that_spells_a_control_token_is_kept(model: ChatModel) -> None:
    text = "".join(sorted(model.template._control._spelled)[:40])
    conversation = Conversation([{"role": "user", "content": f"é{text}{text}x"}])
    ids = model.template.encode(conversation)
    assert f"é{text}{text}x" in model.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_assistants_own_text_may_have_control_tokens() -> None:
    model = chat_model("qwen3")
    messages = [*HELLO.messages, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}, *HELLO.messages]
    fields = {"messages": messages, "add_generation_prompt": True}
    assert found(model.template.encode, fields) == model.expected(fields, tokenize=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen2_5", ["<|im_end|>"]), ("qwen3", ["<|im_end|>"]), ("llama3_1", ["<|eot_id|>"]),
     ("gemma3", ["<end_of_turn>"]), ("mistral_nemo", ["</s>"]),
     ("deepseek_v3", ["<\uff5cend\u2581of\u2581sentence\uff5c>"])],
)  # fmt: skip
def test_turns_end_at_the_token_that_the_template_writes(name: str, expected: list[str]) -> None:
    model = chat_model(name)
    assert [model.tokenizer.id_to_token(token_id) for token_id in model.template.stop_token_ids] == expected


def test_what_templates_can_do_is_found_by_trying() -> None:
    takes = {name: chat_model(name).template.takes_tools for name in MODELS}
    assert takes == {name: name not in ("llama3_1", "gemma3", "deepseek_v3") for name in MODELS}
    forms = {name: chat_model(name).template._call_form for name in MODELS}
    assert forms == {"qwen2_5": ("", True), "qwen3": ("", True), "llama3_1": None, "gemma3": None,
                     "deepseek_v3": None, "llama3_2": ("", True), "mistral_nemo": ("", True)}  # fmt: skip


def test_messages_of_clients_become_those_of_templates() -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "Sun"},
    ]
    for name in ("qwen2_5", "qwen3", "llama3_2", "mistral_nemo"):
        model = chat_model(name)
        found = model.template.normalized(messages)
        assert found[0] == {"role": "system", "content": "Be\nbrief."}
        assert found[2]["tool_calls"][0]["function"]["arguments"] == {"place": "Rome"}
        text = model.template.render(Conversation(found))
        assert '{"place": "Rome"}' in text and "Sun" in text
    with pytest.raises(InputError, match="no JSON object"):
        broken = {**call, "function": {"name": "weather", "arguments": "{"}}
        model.template.normalized([{"role": "assistant", "tool_calls": [broken]}])
    with pytest.raises(InputError, match="does not write"):
        chat_model("gemma3").template.normalized(messages)


HOSTILE = {
    # CVE-2024-34359: code of a GGUF file's template ran in llama-cpp-python.
    "code": "{% for c in [].__class__.__base__.__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
            "{{ c()._module.__builtins__['__import__']('os').system('touch FILE') }}{% endif %}{% endfor %}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "function": "{{ strftime_now.__globals__['sys'].exit() }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "string": "{{ messages[0].content * 10**10 }}",
    "doubling": "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "padding": "{{ '%99999999999d' % 1 }}",
    "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "raises": "{{ raise_exception('no') }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error(name: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    source = "{% if messages[0].content == 'Hello' %}" + HOSTILE[name] + "{% endif %}well"
    template = ChatTemplate(source.replace("FILE", str(witness)), Tokenizer.from_str(EMPTY))
    with pytest.raises(InputError, match="the chat template fails") as refused:
        template.render(HELLO)
    assert refused.value.argument == "messages"
    assert not witness.exists()
    assert template.render(Conversation([{"role": "user", "content": "Bye"}])) == "well"  # it still works for others


EMPTY = Tokenizer.from_str(
    '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, '
    '"pre_tokenizer": null, "post_processor": null, "decoder": null, "model": {"type": "BPE", "vocab": {}, '
    '"merges": []}}'
).to_str()


@pytest.mark.parametrize(
    "source",
    ["{{", "{% if %}", "{{ 10 ** (10 ** 10) }}", "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}"],
)
def test_a_template_that_cannot_be_read_is_an_error(source: str, tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_text(source)
    with pytest.raises(ManifestError, match=r"chat_template\.jinja: the chat template is not valid"):
        load_chat_template(file, Tokenizer.from_str(EMPTY))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "at least one"), ("Hello", "at least one"), ([7], r"messages\[0\] is a int"),
        ([{"role": "boss", "content": "x"}], "has the role 'boss'"), ([{"content": "x"}], "has the role None"),
        ([{"role": "user"}], "has no content"), ([{"role": "user", "content": 7}], "content of type int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "no other kind is read"),
    ],
)  # fmt: skip
def test_messages_that_make_no_sense_are_named(messages: Any, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as refused:
        Conversation(messages)
    assert refused.value.argument == "messages"


def test_values_that_are_no_text_are_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}", Tokenizer.from_str(EMPTY))
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    for arguments, fault in (({"a": deep}, "deep"), ({"a": object()}, "JSON")):
        with pytest.raises(InputError, match=fault):
            template.render(Conversation(HELLO.messages, template_arguments=arguments))
    with pytest.raises(InputError, match="surrogate"):
        template.encode(Conversation([{"role": "user", "content": "\ud800"}]))
    every = "".join(map(chr, range(0x20000, 0x2A6E0)))
    with pytest.raises(InputError, match="42,720 letters"):
        template.encode(Conversation([{"role": "user", "content": every}]))
