"""verify: texts that the bundle's tokenizer or decoder treats otherwise than their token ids are counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from chameleon_deploy import Runtime
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.verify.promises import check_texts

TEXTS = ["The river", "a", "It was<|endoftext|>late", "of the hills"]


def figures(runtime: Runtime, mini: Checkpoint) -> list[tuple[float, float | None]]:
    tokenizer = mini.trunk.tokenizer
    rows = [tokenizer.encode(text).ids for text in (*TEXTS, "")]
    assert sorted(map(len, rows))[:2] == [0, 1]
    checks = list(check_texts(runtime, tokenizer, rows))
    assert checks[0].note == "4 texts"  # without the empty one
    return [(check.value, check.limit) for check in checks]


def test_special_tokens_that_the_bundle_leaves_out(runtime: Runtime, mini: Checkpoint) -> None:
    tokenizer = Tokenizer.from_str(mini.trunk.tokenizer.to_str())
    end = "<|endoftext|>"
    tokenizer.post_processor = TemplateProcessing(f"{end} $A", special_tokens=[(end, tokenizer.token_to_id(end))])
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    ids, _ = check_texts(runtime, tokenizer, rows)
    assert ids.value == 4
    assert not ids.passed


def test_texts(runtime: Runtime, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    score, generate, modes = runtime.score, runtime.generate, list[Any]()

    def wrong_ids(texts: Any, mode: Any) -> Any:
        assert texts == TEXTS
        modes.append(mode)
        first, *others = score(texts, mode=mode)
        return [replace(first, token_ids=[*first.token_ids, 0]), *others]

    def wrong_texts(prompts: Any, max_new_tokens: int, mode: Any) -> Any:
        assert max_new_tokens == 1
        modes.append(mode)
        first, *others, last = generate(prompts, max_new_tokens=max_new_tokens, mode=mode)
        return [replace(first, text="!") if prompts == TEXTS else first, *others, last]

    assert figures(runtime, mini) == [(0, 0), (0, 0)]
    monkeypatch.setattr(runtime, "score", wrong_ids)
    assert figures(runtime, mini) == [(1, 0), (0, 0)]
    monkeypatch.setattr(runtime, "generate", wrong_texts)
    assert figures(runtime, mini) == [(1, 0), (1, 0)]
    assert set(modes) == {None}
    modes.clear()
    takes_vectors = msgspec.structs.replace(runtime.manifest.adaptation, conditioning_size=8)
    monkeypatch.setattr(runtime, "manifest", msgspec.structs.replace(runtime.manifest, adaptation=takes_vectors))
    figures(runtime, mini)
    assert set(modes) == {"none"}  # the others need vectors
