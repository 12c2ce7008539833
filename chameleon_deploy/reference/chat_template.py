"""The chat template of a base model, as the one file of a bundle.

`transformers` finds it in chat_template.jinja, in tokenizer_config.json or in a GGUF file, and gives templates the
special tokens of the tokenizer as variables. Here the file sets them itself, so that it says all that a runtime needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chameleon_deploy.errors import InputError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplates:
    """What a tokenizer knows of chat templates.

    template        or templates by name, of which "tool_use" is for conversations with tools and "default" for others
    special_tokens  texts by the names of SPECIAL_TOKENS
    """

    template: str | Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, Any] = field(default_factory=dict)

    def source(self) -> str | None:
        """Return the template with the special tokens that it names, or None where there is none.

        Raises InputError for named templates without a default.
        """
        source = self.template if isinstance(self.template, str) else _joined(self.template)
        if source is None:
            return None
        named = {name: str(self.special_tokens[name]) for name in SPECIAL_TOKENS
                 if self.special_tokens.get(name) and re.search(rf"\b{name}\b", source)}  # fmt: skip
        return "".join(f"{{% set {name} = {_literal(text)} %}}\n" for name, text in named.items()) + source


def _joined(templates: Mapping[str, str]) -> str | None:
    """Return one template that does as the named one would.

    Blocks are trimmed: a line break after one is not written, nor, but for `+`, the space before it.
    """
    if not templates:
        return None
    if "default" not in templates:
        raise InputError(f"the chat templates {sorted(templates)} have no default: pass one by --chat-template FILE")
    default = templates["default"]
    if "tool_use" not in templates:
        return default
    tool_use = templates["tool_use"].removesuffix("\n")  # Jinja drops it from the end of a template
    return f"{{% if tools is not none %}}\n{tool_use}{{%+ else %}}\n{default.removesuffix(chr(10))}{{%+ endif %}}"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
