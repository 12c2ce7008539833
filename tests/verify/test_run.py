"""verify: which texts a bundle is compared on, on which of its graphs, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import InputError
from chameleon_deploy.export import trunk
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.model import trunk_from
from chameleon_deploy.runtime.known_answers import recorded_answers
from chameleon_deploy.terminal.progress import silent
from chameleon_deploy.verify import checkpoint_checks, run
from chameleon_deploy.verify.gates import Check
from chameleon_deploy.verify.run import VerifyOptions, rows_within, verification_rows, verify_bundle
from tests.families import small_model

Rows = Callable[..., list[list[int]]]


@pytest.fixture
def rows_of(mini: Checkpoint, tmp_path: Path) -> Rows:
    """Rows of a file of texts, for a model of some positions whose tokenizer begins each text with token 0."""
    tokenizer = Tokenizer.from_str(mini.trunk.tokenizer.to_str())
    first = tokenizer.id_to_token(0)
    tokenizer.post_processor = TemplateProcessing(f"{first} $A", special_tokens=[(first, 0)])

    def rows(texts: list[str], positions: int, more: bool = False) -> list[list[int]]:
        file = tmp_path / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        checkpoint: Any = SimpleNamespace(trunk=SimpleNamespace(tokenizer=tokenizer, max_positions=positions))
        found = verification_rows(checkpoint, [file], more)
        assert all(ids[0] == 0 and 0 not in ids[1:] for ids in found)
        return found

    return rows


def test_rows_of_a_file(rows_of: Rows) -> None:
    *ragged, longest = rows_of(["a"] * 32, 32)
    assert [ids[1:] for ids in ragged] == [longest[1 : min(len(ids), 2)] for ids in ragged]
    assert max(map(len, ragged)) == 2
    assert len(longest) == 32
    for texts, positions in ((31, 31), (32, 33)):
        with pytest.raises(InputError, match=f"at least 32 texts and {positions} tokens, got {texts} and {texts}"):
            rows_of(["a"] * texts, positions)


def test_lengths_of_rows(rows_of: Rows) -> None:
    texts = [" ".join("abcdefgh" * 8)] * 40  # more than 48 tokens each
    lengths = list(map(len, rows_of(texts, 100)))
    assert lengths[:3] == [1, 6, 10]
    assert sorted(lengths[:32]) == [3 * (row + 1) // 2 for row in range(32)]
    assert lengths[32:] == [100]
    assert sorted(map(len, rows_of(texts, 16))) == sorted([max(row // 2, 1) for row in range(1, 33)] + [16])
    assert list(map(len, rows_of(texts, 100, more=True)))[32:] == [100] * 25


def test_windows_are_spread_over_a_text() -> None:
    stream = list(range(100))
    assert [ids[0] for ids in run._windows(stream, 4, 20)] == [0, 25, 50, 75]
    assert [(ids[0], ids[-1]) for ids in run._windows(stream, 4, 40)] == [(0, 39), (50, 89)]


def test_rows_that_engines_take() -> None:
    rows = [[row] * length for row, length in enumerate((3, 9, 5, 4))]

    def within(batch: int, factor_sets: int) -> list[list[int]]:
        limits: Any = SimpleNamespace(batch=batch, factor_sets=factor_sets, sequence=6)
        return rows_within(rows, limits)

    assert within(3, 9) == [rows[0], rows[2], rows[1][:6]]
    assert within(9, 2) == [rows[0], rows[1][:6]]
    assert within(9, 9) == [rows[0], rows[2], rows[3], rows[1][:6]]


@pytest.mark.parametrize("keep_trunk", [None, True, False])
def test_each_graph_is_verified(
    keep_trunk: bool | None, bundle: Path, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped, reported, called = list[int](), list[Any](), list[tuple[str, bool, float | None]]()
    monkeypatch.setattr(type(mini.trunk), "drop_layers", lambda trunk: dropped.append(1))

    def verify(
        runtime: Any, reference: Any, rows: Any, whole: bool, report: Any, max_kl: float | None, **_: Any
    ) -> list[Check]:
        texts = [*rows, *known]
        assert set(map(tuple, texts)) == reference.hidden.keys()  # read before layers are dropped
        called.append((runtime.graph, whole, max_kl))
        return [Check("a", 1, 2)]

    answers = recorded_answers(open_bundle(bundle))
    known = [ids for mode in ("none", "cohort") for ids in checkpoint_checks.continued_rows(answers, mode)]
    assert len(known) == 8
    monkeypatch.setattr(checkpoint_checks, "verify_checkpoint", verify)
    named: dict[str, Any] = {} if keep_trunk is None else {"keep_trunk": keep_trunk}
    checks, record = verify_bundle(
        bundle, mini, lambda *step: reported.append(step), VerifyOptions(threads=1, max_kl=0.5, **named)
    )
    assert called == [("decoder_cpu", True, 0.5), ("decoder", False, 0.5)]
    assert len(checks) == len(record["checks"]) == 2
    assert (record["provider"], record["texts"], record["verified"]) == ("cpu", 33, True)
    assert reported == [("verify: reference", done, 41) for done in range(41)]
    assert bool(dropped) == (keep_trunk is False)


def test_a_provider_has_one_graph(bundle: Path, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the CPU here, with the rows of a device."""
    called: list[Any] = []

    def verify(runtime: Any, whole: bool, rows: Any, **_: Any) -> list[Check]:
        called.append((runtime.graph, whole, len(rows)))
        return [Check("a", 3, 2)]

    monkeypatch.setattr(checkpoint_checks, "verify_checkpoint", verify)
    monkeypatch.setattr(run, "rows_within", lambda rows, limits: rows[-5:])
    checks, record = verify_bundle(bundle, mini, lambda *_: None, VerifyOptions(threads=1, provider="auto"))
    assert called == [("decoder_cpu", True, 5)]
    assert [check.passed for check in checks] == [record["verified"]] == [False]
    assert (record["provider"], record["texts"]) == ("cpu", 5)


def test_a_quick_verification_says_what_it_leaves_out(
    bundle: Path, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[1] * 300 for _ in range(60)]
    assert [len(ids) for ids in run._fewer(rows, parameters=1)] == [300] * 35 + [256]
    assert run._fewer(rows[:33], parameters=1) == [*rows[:32], rows[32][:256]]
    # The larger the model, the fewer tokens: 5,000, 1,000, and what there must be at least.
    assert [len(ids) for ids in run._fewer(rows, parameters=10**8)] == [300] * 15 + [256]
    assert [len(ids) for ids in run._fewer([[1] * 30] * 60, parameters=10**9)] == [30] * 15 + [30]
    assert [len(ids) for ids in run._fewer(rows, parameters=10**11)] == [300] * 8 + [2]
    checks, record = verify_bundle(bundle, mini, lambda *_: None, VerifyOptions(threads=1, quick=True))
    assert (record["quick"], record["verified"]) == (True, True)
    assert [check.name for check in checks if "left out" in check.name] == ["left out: tokens of texts"]
    monkeypatch.setattr(run, "QUICK_SECONDS", 0)
    checks, record = verify_bundle(bundle, mini, lambda *_: None, VerifyOptions(threads=1, quick=True))
    assert {"left out: logits", "left out: mode cohort, all of it", "left out: data"} <= {c.name for c in checks}
    assert all(check.limit is None for check in checks)
    assert "KL" not in " ".join(check.name for check in checks)


def test_a_fault_beyond_the_usual_length_is_seen_in_a_longer_text(
    llama: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: from position 2,048 on, the rotary embedding begins again."""
    positions, usual = 2400, run.LONGEST
    model = small_model("llama", max_position_embeddings=positions, num_hidden_layers=1)
    base = load_adapted("llama", {}, trunk_from(model, llama.trunk.tokenizer))
    tables = trunk.rotary_tables

    def starting_again(*arguments: Any) -> list[Any]:
        return [np.concatenate([table[:usual], table[: positions - usual]]) for table in tables(*arguments)]

    def verified(bundle: Path, longest: int) -> bool:
        _, record = verify_bundle(bundle, base, silent, VerifyOptions(threads=1, longest=longest))
        assert record["tokens"] > longest
        return bool(record["verified"])

    export_bundle(base, tmp_path / "right")
    assert verified(tmp_path / "right", positions)
    monkeypatch.setattr(trunk, "rotary_tables", starting_again)
    export_bundle(base, tmp_path / "wrong")
    assert verified(tmp_path / "wrong", usual)
    assert not verified(tmp_path / "wrong", positions)
