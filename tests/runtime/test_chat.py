"""Conversations in the library: prompts from the bundle's template, answers that end with the assistant's turn."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import chameleon_deploy
from chameleon_deploy import Conversation, Engine, Runtime, Sampling
from chameleon_deploy.chat import Chat
from chameleon_deploy.errors import InputError, ManifestError
from chameleon_deploy.reference.chat_template import ChatTemplates
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.runtime.chat.template import ChatTemplate
from tests.commands import call
from tests.speaking_model import ROOM, chat_source, prompt_for, speaking_bundle

ANSWERS = ("The river runs.", "It runs through the old town.")


@pytest.fixture(scope="module")
def speaking(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    path = tmp_path_factory.mktemp("speaking") / "bundle"
    speaking_bundle(ANSWERS, mini.trunk.tokenizer, path, chat_source())
    return chameleon_deploy.load(path, threads=1, mode="none")


def asking(runtime: Runtime, answer: int) -> list[dict[str, Any]]:
    """Return the messages to which a model gives one of its answers."""

    def messages(text: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]

    return messages(prompt_for(answer, lambda text: len(runtime.chat_template.encode(Conversation(messages(text))))))


@pytest.mark.parametrize("answer", range(len(ANSWERS)))
def test_an_answer_ends_with_its_turn(speaking: Runtime, answer: int) -> None:
    messages = asking(speaking, answer)
    found = speaking.chat(messages, max_new_tokens=ROOM // 2)
    assert (found.text, found.finish_reason) == (ANSWERS[answer], "stop")
    ids = speaking.chat_template.encode(Conversation(messages))
    assert found == speaking.generate([ids], max_new_tokens=ROOM // 2)[0]
    with Engine(speaking, rows=2) as engine:
        streams = [engine.submit_chat(messages, max_new_tokens=ROOM // 2, n=n) for n in (1, 2)]
        texts = [generation.text for stream in streams for generation in stream.result(60)]
    assert texts == [ANSWERS[answer]] * 3


def test_the_turns_end_stops_where_it_is_not_the_models_end_of_text(speaking: Runtime) -> None:
    messages = asking(speaking, 0)
    comma = speaking.encode(["."])[0][0]
    speaking.chat_template.__dict__["stop_token_ids"] = (comma,)
    try:
        found = speaking.chat(messages, max_new_tokens=50)
        assert (found.text, found.finish_reason) == ("The river runs", "stop")
        going_on = speaking.chat(messages, max_new_tokens=50, sampling=Sampling(ignore_eos=True))
        assert going_on.finish_reason == "length"
    finally:
        del speaking.chat_template.__dict__["stop_token_ids"]
    assert speaking.chat_template.stop_token_ids == (0,)


def test_what_cannot_be_answered_is_refused_by_the_name_of_its_argument(speaking: Runtime, runtime: Runtime) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: runtime.chat(hello), "messages"),  # no template
        (lambda: speaking.chat(hello, n=2), "n"),
        (lambda: speaking.chat([]), "messages"),
        (lambda: speaking.chat([{"role": "tool", "tool_call_id": "x", "content": "5"}]), "messages"),
        (lambda: speaking.chat("Hello"), "messages"),  # type: ignore[arg-type]
        (lambda: speaking.chat(hello, max_new_tokens=0), "max_new_tokens"),
    ]
    for work, argument in calls:
        with pytest.raises(InputError) as refused:
            work()
        assert refused.value.argument == argument
    with pytest.raises(InputError, match="--chat-template FILE"):
        runtime.chat(hello)


def test_export_writes_a_template_and_inspect_lists_it(mini_path: Path, tmp_path: Path) -> None:
    file, bundle = tmp_path / "mine.jinja", tmp_path / "bundle"
    file.write_text("{{ messages[-1].content }}{{ eos_token }}\n")
    export = ("chameleon_deploy.export", mini_path, "--no-verify", "--chat-template", file, "--out")
    assert call(*export, bundle).returncode == 0
    assert "chat template" in call("chameleon_deploy.inspect", bundle).stdout
    assert "chat_template.jinja" in json.loads(call("chameleon_deploy.inspect", bundle, "--json").stdout)["files"]
    hello = Conversation([{"role": "user", "content": "x"}])
    assert chameleon_deploy.load(bundle).chat_template.render(hello) == "x<|endoftext|>"
    file.write_text("{% if %}")
    refused = call(*export, tmp_path / "other")
    assert refused.returncode == 2
    assert "chat_template.jinja: the chat template is not valid: line 1" in refused.stderr
    assert not (tmp_path / "other").exists()
    with (bundle / "chat_template.jinja").open("a") as opened:
        opened.write(" ")
    with pytest.raises(chameleon_deploy.ChameleonError, match=r"chat_template\.jinja"):
        chameleon_deploy.load(bundle)


def test_named_templates_become_one_that_does_the_same(mini: Checkpoint) -> None:
    import transformers

    templates = {
        "default": "  {% for m in messages %}\n {{ m.content }}{{ bos_token }}\n{% endfor %}\n",
        "tool_use": "\n\n{%- set x = 1 %}\n  {% if x %}\n it's {{ tools[0].function.name }} \n\n",
    }
    templates["tool_use"] += "{% endif %}\n  \n"
    special = {"bos_token": "<'\\b>"}
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=mini.trunk.tokenizer, chat_template=templates, **special
    )
    source = ChatTemplates(templates, special).source()
    assert source is not None
    template = ChatTemplate(source, mini.trunk.tokenizer)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    for tools in (None, [tool]):
        messages = [{"role": "user", "content": "x"}]
        expected = reference.apply_chat_template(messages, tools=tools, tokenize=False)
        assert template.render(Conversation(messages, tools), add_generation_prompt=False) == expected
    assert ChatTemplates().source() is None
    with pytest.raises(InputError, match="no default"):
        ChatTemplates({"rag": "x"}).source()


def test_a_bundle_with_a_template_that_is_not_valid_generates_and_does_not_chat(
    speaking: Runtime, tmp_path: Path
) -> None:
    from chameleon_deploy.runtime.chat.template import load_chat_template

    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"\xff")
    with pytest.raises(ManifestError, match="utf-8"):
        load_chat_template(file, speaking.tokenizer)
    file.write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ManifestError, match="1,048,576 bytes"):
        load_chat_template(file, speaking.tokenizer)


def command(runtime: Runtime, *arguments: str) -> Any:
    module = [sys.executable, "-m", "chameleon_deploy.chat", str(runtime.bundle.path), "--threads", "1"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell that runs the tests in the background has them ignore the signal, which a child inherits.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*module, "--mode", "none", "--temperature", "0", *arguments], preexec_fn=listen, **pipes)


def test_the_terminal_hears_all_turns(speaking: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    stream = speaking.stream

    def listening(prompts: Any, *arguments: Any, **keywords: Any) -> Any:
        heard.append(speaking.tokenizer.decode(prompts[0], skip_special_tokens=True))
        return stream(prompts, *arguments, **keywords)

    monkeypatch.setattr(speaking, "stream", listening)
    talk = Chat(speaking, "Be brief.", 4, Sampling(ignore_eos=True), None)
    answers = ["".join(talk.answer(text)) for text in ("One", "Two")]
    assert heard[1] == f"system: Be brief.\nuser: One\nassistant: {answers[0]}\nuser: Two\nassistant:"
    part = talk.answer("Three")
    begun = next(part)
    part.close()  # as Ctrl-C does
    talk.undo()
    "".join(talk.answer("Four"))
    assert "Three" not in heard[-1] and answers[1] in heard[-1]
    with pytest.raises(InputError):
        "".join(talk.answer("\ud800"))
    "".join(talk.answer("Five"))
    assert heard[-1].count("user: ") == 4 and begun is not None
    talk.clear()
    "".join(talk.answer("Six"))
    assert heard[-1] == "system: Be brief.\nuser: Six\nassistant:"


def test_an_interrupt_stops_the_answer_and_not_the_program(speaking: Runtime) -> None:
    with command(speaking, "--max-new-tokens", "700") as talking:
        talking.stdin.write("Hello\n")
        talking.stdin.flush()
        assert talking.stdout.read(1)
        talking.send_signal(signal.SIGINT)
        out, err = talking.communicate("Hello again\n/clear\n/exit\n", timeout=60)
    assert talking.returncode == 0, err
    assert "stopped" in err and len(out) > 1


def test_the_terminal_says_what_a_bundle_lacks(bundle: Path) -> None:
    refused = call("chameleon_deploy.chat", bundle)
    assert refused.returncode == 2 and "--chat-template FILE" in refused.stderr
    refused = call("chameleon_deploy.chat", bundle, "--load-adapter", "legal=nowhere")
    assert refused.returncode == 2 and "nowhere" in refused.stderr
