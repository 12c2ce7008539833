"""A model that says given texts: which one depends on the length of its prompt, so that a test chooses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from chameleon_deploy import Conversation
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.chat_template import ChatTemplates
from chameleon_deploy.runtime.chat.conversation import Message
from chameleon_deploy.runtime.chat.template import ChatTemplate
from tests.conftest import checkpoint_around

ROOM = 384  # tokens of a prompt with its answer
TEMPLATE = """{% if tools %}
tools: {{ tools | tojson }}
{% endif %}
{% if shout %}
{{ shout }}
{% endif %}
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>
{%- endfor %}
{{ eos }}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{%- endif %}
"""


def chat_source(call_words: str = "<tool_call>") -> str:
    """Return a template in which the text of an end is the tiny models' end of text."""
    return "{% set eos = '<|endoftext|>' %}\n" + TEMPLATE.replace("<tool_call>", call_words)


def speaking_bundle(answers: Sequence[str], tokenizer: Any, path: Path, template: str) -> None:
    """Export a GPT-2 that answers a prompt of ROOM * k + ROOM / 2 tokens with answers[k].

    Its layers do nothing, and the embedding of a position is that of the token which comes next.

    tokenizer  byte-level; its token 0 ends the answers
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    config = transformers.GPT2Config(
        n_layer=1, n_embd=64, n_head=4, vocab_size=tokenizer.get_vocab_size(), n_positions=ROOM * len(answers),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    checkpoint = checkpoint_around(config)
    checkpoint.trunk.tokenizer = tokenizer
    model = checkpoint.trunk.causal_lm.transformer
    with torch.no_grad():
        model.wte.weight[:] = torch.nn.functional.normalize(torch.randn_like(model.wte.weight), dim=1)
        for projection in (model.h[0].attn.c_proj, model.h[0].mlp.c_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        for k, answer in enumerate(answers):
            ids = [*tokenizer.encode(answer).ids, 0]
            start = ROOM * k + ROOM // 2 - 1
            model.wpe.weight[start : start + len(ids)] = 50 * model.wte.weight[ids]
    checkpoint.trunk.chat = ChatTemplates(template)
    export_bundle(checkpoint, path)


def prompt_for(answer: int, length: Any) -> str:
    """Return the text of a message that makes a prompt of the length that an answer has.

    length  from a text to the number of tokens of its prompt
    """
    wanted = ROOM * answer + ROOM // 2
    text = ""
    while (missing := wanted - length(text)) > 0:
        text += "\x01" * missing  # no token has two of them
    assert length(text) == wanted
    return text


def system_for(answer: int, template: ChatTemplate, messages: Sequence[Message], tools: Any = None) -> str:
    """Return a system prompt before some messages, to which the model gives one of its answers."""

    def length(text: str) -> int:
        given = template.normalized([{"role": "system", "content": text}, *messages])
        return len(template.encode(Conversation(given, tools)))

    return prompt_for(answer, length)
