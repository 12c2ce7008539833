"""Evaluation: the right sums, intervals that mean something, and mutations that show."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from chameleon_deploy import Runtime
from chameleon_deploy.evaluate.scoring import Evaluation, bootstrap_gain, cohort_rows, evaluate
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.hypernetwork import Hypernetwork
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.random import random_checkpoint
from tests.commands import call
from tests.logits import row_logits

EVALUATE = "chameleon_deploy.evaluate"
TEXTS = [text for kind in KINDS for text in python_texts(kind, 12)]


def test_masked_loss_is_the_next_token_loss(mini: Checkpoint, tmp_path: Path) -> None:
    """Against each text alone through the reference's logits: no cache, no cohorts, no chunks."""
    evaluation = evaluate(mini, TEXTS, tmp_path)
    ids, cohorts = cohort_rows(mini, TEXTS)
    for rows in cohorts:
        adaptation = inference.adapt(mini, [ids[row] for row in rows], "cohort")
        for i, row in enumerate(rows):
            logprobs = row_logits(mini, ids[row], adaptation, i).double().log_softmax(-1)
            nll = -logprobs[:-1].gather(1, torch.tensor(ids[row][1:])[:, None]).sum()
            assert evaluation.nll[row] == pytest.approx(float(nll), rel=1e-5)
    assert evaluation.positions.tolist() == [len(i) - 1 for i in ids]


def test_paper_loss_is_the_last_position_against_its_own_token(mini: Checkpoint, tmp_path: Path) -> None:
    evaluation = evaluate(mini, TEXTS[:3], tmp_path, adapted=False, protocol="paper")
    eos, width = mini.trunk.eos_token_id, mini.config.max_length
    for row, text in enumerate(TEXTS[:3]):
        ids = mini.trunk.tokenizer.encode(text).ids[:width]
        padded = torch.tensor([ids + [eos] * (width - len(ids))])
        hidden, _ = mini.trunk.hidden_states(padded)
        logprobs = (hidden[0, -1] @ mini.trunk.head_weight.T).double().log_softmax(-1)
        assert evaluation.nll[row] == pytest.approx(-float(logprobs[padded[0, -1]]), rel=1e-5)
    assert evaluation.positions.tolist() == [1, 1, 1]


def test_bundle_and_reference_agree(runtime: Runtime, mini: Checkpoint, tmp_path: Path) -> None:
    ids, cohorts = cohort_rows(mini, TEXTS)
    nll = 0.0
    for rows in cohorts:
        nll -= sum(score.logprob for score in runtime.score([ids[row] for row in rows], mode="cohort"))
    evaluation = evaluate(mini, TEXTS, tmp_path)
    assert math.exp(nll / evaluation.num_positions) == pytest.approx(evaluation.perplexity, rel=1e-4)


def test_a_rerun_gives_the_same_figures(mini: Checkpoint, tmp_path: Path) -> None:
    first, again = (evaluate(mini, TEXTS, tmp_path / name) for name in "ab")
    assert np.array_equal(first.nll, again.nll)
    base = evaluate(mini, TEXTS, tmp_path / "a", adapted=False)
    assert bootstrap_gain(first, base) == bootstrap_gain(again, base)


def test_mutations_change_the_figure(mini: Checkpoint, tmp_path: Path) -> None:
    """Another cluster's centroid, swapped factors and a shifted label each show in the third digit at least."""
    right = evaluate(mini, TEXTS, tmp_path)
    swapped = dataclasses.replace(mini, factors=copy.deepcopy(mini.factors))
    assert isinstance(swapped.factors, Hypernetwork)
    last = swapped.factors.linears()[-1]
    last.weight.data, last.bias.data = last.weight.data.flip(0), last.bias.data.flip(0)
    assert abs(evaluate(swapped, TEXTS, tmp_path).loss - right.loss) > 1e-3
    mixed = dataclasses.replace(mini, centroids=mini.centroids[:1])  # everything in one cluster
    assert abs(evaluate(mixed, TEXTS, tmp_path).nll - right.nll).max() > 1e-3
    from chameleon_deploy.reference import hidden_states

    targets = hidden_states.targets_of
    try:
        hidden_states.targets_of = lambda ids, *rest: targets([*ids[1:], ids[0]], *rest)
        assert abs(evaluate(mini, TEXTS, tmp_path / "shifted").loss - right.loss) > 1e-3
    finally:
        hidden_states.targets_of = targets


def _made(nll: list[float]) -> Evaluation:
    return Evaluation("lora", "masked", 1, np.array(nll), np.full(len(nll), 10), np.zeros(len(nll), np.int64))


def test_bootstrap_interval() -> None:
    random = np.random.default_rng(1)
    base = _made(list(random.normal(30, 5, 200)))
    better = _made(list(base.nll - random.normal(0.5, 0.1, 200)))
    low, high = bootstrap_gain(better, base)
    assert low < math.expm1(-0.05) < high < 0  # a paired gain is seen although texts scatter ten times as much
    same = _made(list(base.nll + random.normal(0, 0.1, 200)))
    low, high = bootstrap_gain(same, base)
    assert low < 0 < high


def test_the_command(mini_path: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    result = call(EVALUATE, mini_path, "--text", tmp_path / "t.jsonl", "--json")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["protocol"], r["regime"]) for r in records] == [
        ("paper", "base"), ("paper", "chameleon"), ("masked", "base"), ("masked", "chameleon"),
    ]  # fmt: skip
    for record in records:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["parameters"] == (141_056 if record["regime"] == "base" else 82_272)
    shown = call(EVALUATE, mini_path, "--text", tmp_path / "t.jsonl")
    assert shown.returncode == 0
    assert "95 % interval" in shown.stdout


def test_bad_input(mini_path: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a\n")
    other = tmp_path / "other"
    random_checkpoint(other, "mini", seed=3)
    for arguments, message in (
        ((mini_path,), "--text FILE or --dataset NAME"),
        ((mini_path, "--text", tmp_path / "short.txt"), "at least two tokens"),
        ((mini_path, other, "--text", tmp_path / "short.txt"), "another base model"),
        ((tmp_path / "nope", "--text", tmp_path / "short.txt"), "does not exist"),
    ):
        result = call(EVALUATE, *arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
