"""Tool calls are found in what models write, however it is cut into pieces; anything else stays text."""

from __future__ import annotations

import json
import random

import pytest

from chameleon_deploy.runtime.chat.tool_calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    Family,
    ToolCall,
    ToolCallParser,
    family_of,
    hidden_marks,
)
from tests.chat_models import chat_model

ROME, OSLO = ("weather", {"place": "Rome"}), ("weather", {"place": "Oslo\n\u2028é", "days": [1, 2.5, None]})
H = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
H2 = json.dumps({"name": OSLO[0], "arguments": OSLO[1]}, ensure_ascii=False).replace("\\n", "\n")
L = '{"name": "weather", "parameters": {"place": "Rome"}}'
L2 = json.dumps({"name": OSLO[0], "parameters": OSLO[1]})
LIST = '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'
NAN = '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'
CASES = [
    (HERMES, "Hello", ["Hello"]),
    (HERMES, H, [ROME]),
    (HERMES, f"I look.\n{H}", ["I look.", ROME]),
    (HERMES, f"I look.\n{H}\n<tool_call>{H2}</tool_call>\n", ["I look.", ROME, OSLO, "\n"]),
    (HERMES, "a <b> < tool_call> <tool_cal", ["a <b> < tool_call> <tool_cal"]),
    (HERMES, "x\n<tool_call>{broken}</tool_call> y", ["x\n<tool_call>{broken}</tool_call> y"]),
    (HERMES, LIST, [LIST]),
    (HERMES, NAN, [NAN]),
    (HERMES, f"{H[:-20]}", [f"{H[:-20]}"]),
    (HERMES, f"{H[:-12]}", [ROME]),  # at the limit of tokens, after its JSON
    (HERMES, "<tool_call>" + "[" * 99999, ["<tool_call>" + "[" * 99999]),
    (LLAMA, "Hello {x}", ["Hello {x}"]),
    (LLAMA, L, [ROME]),
    (LLAMA, f"<|python_tag|>{L}", [ROME]),
    (LLAMA, f"\n{L}; {L2}", [ROME, OSLO]),
    (LLAMA, '{"a": 1}', ['{"a": 1}']),
    (LLAMA, "<|python_x", ["<|python_x"]),
    (LLAMA, f"It is {L}", [f"It is {L}"]),
    (MISTRAL, "Hello [x]", ["Hello [x]"]),
    (MISTRAL, f"[TOOL_CALLS] [{L}, {H2}]", [ROME, OSLO]),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"place": "Rome"}[TOOL_CALLS]weather{"place": "Rome"}', [ROME, ROME]),
    (MISTRAL, "[TOOL_CALLS] soon", ["[TOOL_CALLS] soon"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "expected"), CASES)
def test_calls_are_found_in_pieces_of_any_size(family: Family, text: str, expected: list[str | tuple]) -> None:  # type: ignore[type-arg]
    chance = random.Random(len(text))
    for size in (1, 3, 10**6) if len(text) < 10**4 else (10**6,):
        parser, found = ToolCallParser(family), []
        at = 0
        while at < len(text):
            step = chance.randint(1, size)
            found += parser.feed(text[at : at + step])
            at += step
        found += parser.finish()
        merged: list[str | tuple[str, object]] = []
        for piece in found:
            if isinstance(piece, ToolCall):
                merged.append((piece.name, json.loads(piece.arguments)))
            elif merged and isinstance(merged[-1], str):
                merged[-1] += piece
            else:
                merged.append(piece)
        assert merged == expected
        ids = [piece.id for piece in found if isinstance(piece, ToolCall)]
        assert len(set(ids)) == len(ids) and all(len(i) == 9 and i.isalnum() for i in ids)


def test_text_is_not_held_back_longer_than_a_call_may_begin() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.feed("The river <to") == ["The river"]
    assert parser.feed("wn") == [" <town"]
    assert ToolCallParser(LLAMA).feed("The") == ["The"]


def test_families_are_known_by_their_templates() -> None:
    families = {"qwen2_5": HERMES, "qwen3": HERMES, "mistral_nemo": MISTRAL, "llama3_2": LLAMA}
    for name, family in families.items():
        assert family_of(chat_model(name).template.source) is family
    assert "[TOOL_CALLS]" in hidden_marks(chat_model("mistral_nemo").tokenizer).values()
    assert hidden_marks(chat_model("qwen3").tokenizer) == {}
