"""An experiment: what it trains, scores and leaves in its work directory, and from where it goes on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from chameleon_deploy.errors import InputError
from chameleon_deploy.evaluate import experiment
from chameleon_deploy.evaluate.experiment import PROTOCOLS, Design, Outcome, run_experiment
from chameleon_deploy.evaluate.variants import VARIANTS, num_parameters
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.corpus import Split
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.presets import PAPER
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.training import fit_checkpoint

# Texts of at most 24 characters, and so of at most 24 tokens.
TEXTS = Split(*([text[:24] for kind in KINDS for text in python_texts(kind, first + 3)[first:]] for first in (0, 3, 6)))
SETTINGS = PAPER.with_options(
    num_clusters=2, max_length=24, epochs=1, batch_size=4, lr=2e-2, lora_lrs=(1e-6, 2e-2), seed=5
)
CHAMELEON = ("cohort_32", "cohort_4", "request", "centroid", "mixed_32", "other_cluster", "shuffled")
WAYS = {"lora": ("static",), "chameleon": CHAMELEON, "chameleon-constant": ("constant",), "lora-large": ("static",)}
JOBS = [(protocol, variant) for protocol in PROTOCOLS for variant in VARIANTS]


class Run(NamedTuple):
    """An experiment and its work directory, and what it reported: what, done, total."""

    work: Path
    outcome: Outcome
    reported: list[tuple[str, int, int]]

    def progress(self, what: str) -> list[tuple[int, int]]:
        return [(done, total) for name, done, total in self.reported if name.startswith(what)]


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def start(mini: Checkpoint, mini_path: Path) -> Start:
    """Start an experiment, or go on with it."""

    def run(
        work: Path, texts: Split = TEXTS, seeds: int = 1, trunk: Trunk = mini.trunk, base: object = mini_path / "base",
        **settings: Any,
    ) -> Run:  # fmt: skip
        reported: list[tuple[str, int, int]] = []
        design = Design(SETTINGS.with_options(**settings), seeds)
        outcome = run_experiment(trunk, str(base), texts, design, work, lambda *step: reported.append(step))
        return Run(work, outcome, reported)

    return run


@pytest.fixture(scope="module")
def finished(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(tmp_path_factory.mktemp("experiment") / "work")


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_what_is_trained_and_scored(finished: Run, mini: Checkpoint) -> None:
    assert finished.progress("trainings") == [(done, len(JOBS)) for done in range(len(JOBS) + 1)]
    assert finished.progress("scoring (chameleon)") == [(done, 8) for done in range(8)] * 2
    # Each variant in each of its ways under the protocol of its training, and in the usual one under the other.
    scored = finished.outcome.scored
    assert sorted((s.variant, s.trained, s.scored, s.conditioning) for s in scored) == sorted([
        *(("base", protocol, protocol, "none") for protocol in PROTOCOLS),
        *((variant.name, trained, protocol, way) for trained, variant in JOBS for protocol in PROTOCOLS
          for way in WAYS[variant.name][: None if protocol == trained else 1]),
    ])  # fmt: skip
    sizes = {variant.name: num_parameters(mini.trunk, SETTINGS, variant) for variant in VARIANTS}
    sizes["base"] = mini.trunk.num_parameters()
    for s in scored:
        assert (s.parameters, s.nll.shape) == (sizes[s.variant], (1, len(TEXTS.test)))
        one_each = s.positions.tolist() == [1] * len(TEXTS.test)
        assert one_each == (s.scored == "paper")
    for (protocol, name), histories in finished.outcome.histories.items():
        path = finished.work / protocol / "seed-5" / name
        record = json.loads((path / "training.json").read_text())
        assert histories == [record["history"]]
        assert record["settings"]["seed"] == 5
        assert record["settings"]["lr"] == 2e-2  # of the two that a LoRA tries, the one that learns
        tensors = load_file(path.with_suffix(".safetensors"))
        for s in scored:
            if (s.trained, s.variant) == (protocol, name):
                assert tensors.pop(f"{s.scored}.{s.conditioning}").tolist() == s.nll[0].tolist()
        assert not tensors
    assert len(finished.outcome.histories) == len(JOBS)


def test_hypernetworks_begin_with_the_seeds_own_lora(start: Start, tmp_path: Path) -> None:
    outcome = start(tmp_path / "work", seeds=2, from_lora=True, lr=0, lora_lrs=(2e-2,)).outcome
    masked: dict[tuple[str, str], Any] = {
        (s.variant, s.conditioning): s.nll for s in outcome.scored if s.trained == s.scored == "masked"
    }
    lora = masked["lora", "static"]
    assert abs(lora[0] - lora[1]).max() > 1e-3
    for variant, way in (("chameleon", "cohort_32"), ("chameleon", "shuffled"), ("chameleon-constant", "constant")):
        assert masked[variant, way] == pytest.approx(lora, rel=1e-5)


def test_the_map_of_the_test_texts(finished: Run, mini: Checkpoint) -> None:
    outcome = finished.outcome
    distances = ((outcome.embeddings[:, None] - outcome.centroids) ** 2).sum(-1)
    assert distances.shape == (len(TEXTS.test), 2)
    assert outcome.cluster_ids.tolist() == distances.argmin(1).tolist()
    assert set(outcome.cluster_ids) == {0, 1}
    tokens = [encoding.ids for encoding in mini.trunk.tokenizer.encode_batch(list(TEXTS.train))]
    assert outcome.train_positions == sum(len(ids) - 1 for ids in tokens)


def test_what_is_left_in_the_work_directory(finished: Run, mini_path: Path) -> None:
    variants = {variant.name for variant in VARIANTS}
    assert names(finished.work) == {"settings.json", "hidden_states", *PROTOCOLS}
    for protocol in PROTOCOLS:
        assert names(finished.work / "hidden_states" / protocol) == {"train", "validation", "test"}
        assert names(finished.work / protocol) == {"seed-5"}
        assert names(finished.work / protocol / "seed-5") == variants | {f"{name}.safetensors" for name in variants}
    path = finished.work / "masked" / "seed-5" / "chameleon-constant"
    constant = load_checkpoint(path)  # it opens the base, too
    assert constant.config.base_model == os.path.relpath(mini_path / "base", path)
    assert constant.config.protocol == "masked"
    assert constant.centroids.shape == (1, 64)  # the mean of the training texts' embeddings
    of_clusters = load_checkpoint(path.with_name("chameleon")).centroids
    assert of_clusters.amin(0).le(constant.centroids + 1e-6).all()
    assert of_clusters.amax(0).ge(constant.centroids - 1e-6).all()


def test_a_base_that_is_no_directory_keeps_its_name(
    start: Start, mini: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "VARIANTS", VARIANTS[:1])
    start(tmp_path, base="some/name")
    found = load_checkpoint(tmp_path / "paper" / "seed-5" / "lora", trunk=mini.trunk)
    assert found.config.base_model == "some/name"


def test_what_is_there_is_not_made_again(
    finished: Run, start: Start, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, trained = copy_of(finished.work), list[Path]()

    def counted(*arguments: Any) -> Any:
        trained.append(arguments[3])
        return fit_checkpoint(*arguments)

    monkeypatch.setattr(experiment, "fit_checkpoint", counted)

    def go_on(**arguments: Any) -> Run:
        trained.clear()
        run = start(work, **arguments)
        for ours, first in zip(run.outcome.scored, finished.outcome.scored, strict=True):
            np.testing.assert_allclose(ours.nll[0], first.nll[0], rtol=1e-3)
        return run

    assert go_on().progress("scoring") == []
    assert trained == []
    seed = work / "masked" / "seed-5"
    (seed / "chameleon.safetensors").unlink()
    assert len(go_on().progress("scoring")) == 8
    assert trained == []
    (seed / "lora").rename(seed / "lora.lr-0.02")  # as if it was killed after one of two trainings
    go_on()
    assert trained == [seed / "lora.lr-1e-06"]
    more = go_on(seeds=2).outcome
    assert len(trained) == 12  # of two LoRAs at two rates, and of two others, under each protocol
    assert {path.parent.name for path in trained} == {"seed-6"}
    assert {len(s.nll) for s in more.scored if s.variant != "base"} == {2}
    assert {len(histories) for histories in more.histories.values()} == {2}


def test_another_experiment_does_not_go_on(finished: Run, start: Start, mini: Checkpoint) -> None:
    other = copy.deepcopy(mini.trunk)
    other.head_weight.data[0, 0] += 1
    others: list[dict[str, Any]] = [{"texts": Split(TEXTS.test, *TEXTS[1:])}, {"lr": 1e-2}, {"trunk": other}]
    for another in others:
        with pytest.raises(InputError, match="holds an experiment on other texts, base, protocols or settings"):
            start(finished.work, **another)


def test_what_cannot_be_compared(start: Start, tmp_path: Path) -> None:
    for message, texts, settings in (
        ("at least 2 clusters", TEXTS, {"num_clusters": 1}),
        ("max_length 129 exceeds the model's 128 positions", TEXTS, {"max_length": 129}),
        ("too few", Split(*TEXTS[:2], []), {"max_length": 128}),
        ("too few", Split(TEXTS.train, [], TEXTS.test), {}),
        ("leave out --from-lora", TEXTS, {"from_lora": True, "architecture": "shared"}),
        ("leave out --targets", TEXTS, {"architecture": "shared", "residual": True}),
    ):
        with pytest.raises(InputError, match=message):
            start(tmp_path, texts, **settings)
