"""Held-out means held out: which command reads which split, and nothing trained depends on the test texts."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from chameleon_deploy import compare, train
from chameleon_deploy.contract.bundle import Protocol
from chameleon_deploy.evaluate import __main__ as evaluate
from chameleon_deploy.evaluate import experiment
from chameleon_deploy.evaluate.variants import VARIANTS
from chameleon_deploy.reference import tiny, training
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.clustering import fit_centroids
from chameleon_deploy.reference.corpus import Split, split_texts
from chameleon_deploy.reference.losses import Losses, Objective, losses_of
from chameleon_deploy.reference.presets import PAPER
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.training import fit_checkpoint

TEXTS = {
    name: [text for kind in KINDS for text in python_texts(kind, first + 8)[first:]]
    for name, first in (("train", 0), ("validation", 8), ("test", 16), ("other", 24))
}


class StoppedError(Exception):
    """The command has said what it reads; the rest is not run."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that a command reads from a dataset; the `datasets` package itself is replaced."""
    splits: list[str] = []

    def load_dataset(*names: str, split: str) -> dict[str, list[str]]:
        splits.append(split)
        return {"text": TEXTS[split]}

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return splits


def _captured(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The arguments of one function, which then stops the command."""
    arguments: list[Any] = []

    def stop(*given: Any, **named: Any) -> None:
        arguments.extend(given)
        raise StoppedError

    patch.setattr(owner, name, stop)
    return arguments


def test_train_reads_train_and_validation(
    asked: list[str], mini_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _captured(monkeypatch, training, "train_checkpoint")
    with pytest.raises(StoppedError):
        train.main(base=str(mini_path / "base"), out=tmp_path / "out", dataset="d")
    assert (arguments[2].train, arguments[2].validation) == (TEXTS["train"], TEXTS["validation"])
    assert asked == ["train", "validation"]


def test_evaluate_reads_test(asked: list[str], mini_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([mini_path], dataset="d", as_json=True)
    assert asked == ["test"]
    record = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (record["protocol"], record["positions"]) == ("paper", len(TEXTS["test"]))


def test_compare_scores_test(
    asked: list[str], mini_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _captured(monkeypatch, experiment, "run_experiment")
    with pytest.raises(StoppedError):
        compare.main(base=str(mini_path / "base"), work=tmp_path / "work", dataset="d", test_texts=3)
    train, validation, test = arguments[2]
    assert (train, validation) == (TEXTS["train"], TEXTS["validation"])
    assert len(test) == 3
    assert set(test) < set(TEXTS["test"])
    assert sorted(asked) == ["test", "train", "validation"]


@pytest.mark.usefixtures("asked")
def test_compare_trains_under_both_protocols_or_one(
    mini_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _captured(monkeypatch, experiment, "run_experiment")
    cases: list[tuple[Protocol | None, tuple[Protocol, ...]]] = [
        (None, experiment.PROTOCOLS), ("masked", ("masked",)), ("paper", ("paper",))
    ]  # fmt: skip
    for chosen, protocols in cases:
        with pytest.raises(StoppedError):
            compare.main(base=str(mini_path / "base"), work=tmp_path / "work", dataset="d", protocol=chosen)
        assert arguments[3].protocols == protocols
        arguments.clear()


def test_the_files_of_compare_are_split_in_three(
    mini_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.jsonl"
    everything = [text for part in TEXTS.values() for text in part]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in everything * 2))  # each text twice
    arguments = _captured(monkeypatch, experiment, "run_experiment")
    with pytest.raises(StoppedError):
        compare.main(base=str(mini_path / "base"), work=tmp_path / "work", text=[file])
    train, validation, test = map(set, arguments[2])
    assert all((train, validation, test))
    assert train | validation | test == set(everything)
    assert not (train & validation | train & test | validation & test)


def test_the_tiny_model_neither_learns_nor_stops_by_its_test_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _captured(monkeypatch, tiny, "train_base")
    with pytest.raises(StoppedError):
        tiny.main(out=tmp_path)
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(tiny, "load_trunk", lambda path: None)
    head = _captured(monkeypatch, tiny, "train_checkpoint")
    with pytest.raises(StoppedError):
        tiny.main(out=tmp_path)
    test = {text for split in tiny.corpus_splits().values() for text in split.test}
    train, validation = head[2].train, head[2].validation
    assert test.isdisjoint(base[0])
    assert test.isdisjoint(train)
    assert test.isdisjoint(validation)
    assert set(train).isdisjoint(validation)
    assert min(map(len, (test, train, validation))) > 100
    # The tenth that is reported is the one that the shipped base never saw.
    assert test == {text for kind in KINDS for text in split_texts(python_texts(kind), 0.1)[1]}


def _trained(mini: Checkpoint, test: str, work: Path) -> dict[str, Any]:
    """Parameters, centroids and losses of every epoch, of a short experiment that is scored on some texts."""
    texts = Split(TEXTS["train"], TEXTS["validation"], TEXTS[test])
    settings = PAPER.with_options(num_clusters=3, max_length=24, epochs=2, batch_size=8, lr=2e-2)
    design = experiment.Design(settings, 1)
    experiment.run_experiment(mini.trunk, "base", texts, design, work, lambda what, done, total: None)
    found: dict[str, Any] = {}
    for protocol in experiment.PROTOCOLS:
        checkpoint = work / protocol / "seed-0" / "chameleon"
        tensors = load_file(checkpoint / "chameleon.safetensors")
        found |= {f"{protocol}.{name}": tensor for name, tensor in tensors.items()}
        history = json.loads((checkpoint / "training.json").read_text())["history"]
        found[f"{protocol}.losses"] = np.array([list(epoch.values()) for epoch in history])
    return found


def _depends_on_the_test_texts(mini: Checkpoint, directory: Path) -> bool:
    first, second = (_trained(mini, test, directory / test) for test in ("test", "other"))
    assert len(first) > 10
    assert first.keys() == second.keys()
    return not all(
        first[name].shape == second[name].shape and np.allclose(first[name], second[name], rtol=1e-3, atol=1e-5)
        for name in first
    )


def _test_losses(patch: pytest.MonkeyPatch) -> dict[str, Losses]:
    """Losses of the test texts by protocol, for a planted fault."""
    losses: dict[str, Losses] = {}

    def remember(trunk: Any, ids: Any, objective: Objective, directory: Path, report: Any) -> Losses:
        found = losses_of(trunk, ids, objective, directory, report)
        if directory.name == "test":
            losses[objective.protocol] = found
        return found

    patch.setattr(experiment, "losses_of", remember)
    return losses


def _clusters_of_the_test_texts(patch: pytest.MonkeyPatch) -> None:
    losses = _test_losses(patch)
    patch.setattr(
        experiment, "fit_centroids", lambda _, *rest: fit_centroids(list(losses.values())[-1].embeddings, *rest)
    )


def _stopping_by_the_test_texts(patch: pytest.MonkeyPatch) -> None:
    losses = _test_losses(patch)
    patch.setattr(
        experiment,
        "fit_checkpoint",
        lambda trunk, config, data, *rest: fit_checkpoint(
            trunk, config, replace(data, validation=losses[config.protocol]), *rest
        ),
    )


def test_nothing_trained_depends_on_the_test_texts(
    mini: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "VARIANTS", VARIANTS[1:2])
    assert not _depends_on_the_test_texts(mini, tmp_path)


@pytest.mark.parametrize("plant", [_clusters_of_the_test_texts, _stopping_by_the_test_texts])
def test_a_leak_of_the_test_texts_is_caught(
    mini: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(experiment, "VARIANTS", VARIANTS[1:2])
    plant(monkeypatch)
    assert _depends_on_the_test_texts(mini, tmp_path)
