"""`compare`: repeatable, resumable, wrong where the code is made wrong, and a page that a browser shows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chameleon_deploy import compare
from chameleon_deploy.errors import ChameleonError, CheckFailedError, InputError, OutputError
from chameleon_deploy.evaluate import __main__ as evaluate_command
from chameleon_deploy.evaluate import experiment, variants
from chameleon_deploy.evaluate.experiment import Design, Scored, run_experiment
from chameleon_deploy.evaluate.figures import (
    CONTROLS,
    Figures,
    control_sheet,
    figures,
    find,
    regime_sheet,
)
from chameleon_deploy.evaluate.page import fill
from chameleon_deploy.evaluate.variants import VARIANTS, ConditioningName
from chameleon_deploy.reference import hidden_states
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.corpus import Split, split_texts
from chameleon_deploy.reference.hypernetwork import Hypernetwork
from chameleon_deploy.reference.presets import PAPER
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.targets import choose_targets
from chameleon_deploy.terminal.html_page import Page
from tests import commands
from tests.conftest import nearly

TEXTS = [text for kind in KINDS for text in python_texts(kind, 18)]
# A rate at which conditioning soon matters.
SETTINGS = PAPER.with_options(num_clusters=3, max_length=40, epochs=2, batch_size=8, lr=2e-2)
SEEDS = 2


def quiet(what: str, done: int, total: int) -> None:
    pass


def splits(texts: list[str] = TEXTS) -> Split:
    """As the command splits them."""
    train, test = split_texts(texts, 0.2)
    return Split(*split_texts(train, 0.1, "stopping"), test)


def run(mini: Checkpoint, work: Path, seeds: int = SEEDS, texts: list[str] = TEXTS) -> list[Figures]:
    return figures(run_experiment(mini.trunk, "base", splits(texts), Design(SETTINGS, seeds), work, quiet).scored, 0)


@pytest.fixture(scope="module")
def finished(mini: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Figures]]:
    work = tmp_path_factory.mktemp("comparison") / "work"
    return work, run(mini, work)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def test_every_row_of_the_tables_is_there(finished: tuple[Path, list[Figures]]) -> None:
    _, found = finished
    regimes = regime_sheet(found)
    assert [row[:3] for row in regimes.rows] == [
        ["", "base", "141,056"], ["paper", "lora", "2,304"], ["paper", "chameleon", "82,272"],
        ["masked", "lora", "2,304"], ["masked", "chameleon", "82,272"],
    ]  # fmt: skip
    for protocol in ("paper", "masked"):
        controls = control_sheet(found, protocol)
        assert [row[1] for row in controls.rows] == [control.label for group in CONTROLS.values() for control in group]
        large = find(found, "lora-large", "static", protocol, protocol).parameters
        assert abs(large / 82_272 - 1) < 576 / 82_272  # to the nearest rank, of 576 numbers
    for f in found:
        assert f.perplexity == pytest.approx(math.exp(f.loss))
        assert f.positions == (f.texts if f.scored == "paper" else f.positions)
        assert f.seeds == (1 if f.regime == "base" else SEEDS)


def test_one_protocol_gives_the_same_figures_as_both(
    mini: Checkpoint, finished: tuple[Path, list[Figures]], tmp_path: Path
) -> None:
    outcome = run_experiment(mini.trunk, "base", splits(), Design(SETTINGS, SEEDS, ("masked",)), tmp_path, quiet)
    both = [f for f in finished[1] if f.scored == "masked" and f.trained in ("", "masked")]
    assert outcome.protocols == ("masked",)
    assert figures(outcome.scored, 0) == both
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "hidden_states", "masked"}
    page = Page("One protocol")
    fill(page, outcome, both, "its settings")
    page.write(tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text()
    assert "Modes and controls, protocol masked" in written
    assert "Modes and controls, protocol paper" not in written
    with pytest.raises(InputError, match="protocols"):  # its scores lack those of the other protocol
        run_experiment(mini.trunk, "base", splits(), Design(SETTINGS, SEEDS), tmp_path, quiet)


def test_layers_of_the_trunk_are_compared_with_every_control(mini: Checkpoint, tmp_path: Path) -> None:
    targets = choose_targets(mini.trunk, ["attention"])
    settings = SETTINGS.with_options(targets=targets, architecture="shared", epochs=1, lora_lrs=(1e-6, 2e-2))
    outcome = run_experiment(mini.trunk, "base", splits(TEXTS[::2]), Design(settings, 1), tmp_path, quiet)
    found = figures(outcome.scored, 0)
    controls = control_sheet(found, "masked")
    assert [row[1] for row in controls.rows] == [control.label for group in CONTROLS.values() for control in group]
    for variant in VARIANTS:
        path = tmp_path / "masked" / "seed-0" / variant.name
        assert load_checkpoint(path, trunk=mini.trunk).config.targets == targets
        record = json.loads((path / "training.json").read_text())
        assert record["settings"]["lr"] == 2e-2  # of the two, the one that learns
        if variant.regime == "lora":
            assert find(found, variant.name, "static", "masked", "masked").change < 0
    hypernetwork = find(found, "chameleon", "cohort_32", "masked", "masked").parameters
    large = find(found, "lora-large", "static", "masked", "masked").parameters
    assert abs(large / hypernetwork - 1) < 0.1
    assert not list((tmp_path / "masked" / "seed-0").glob("*.lr-*"))


def test_training_helps(finished: tuple[Path, list[Figures]]) -> None:
    for variant in VARIANTS:
        assert find(finished[1], variant.name, variants.usual(variant), "masked", "masked").change < -0.05


def test_a_rerun_gives_the_same_table_and_more_seeds_go_on(
    mini: Checkpoint, finished: tuple[Path, list[Figures]], tmp_path: Path
) -> None:
    work, found = finished
    assert run(mini, work) == found  # nothing is trained again
    first = run(mini, tmp_path / "again", seeds=1)
    assert run(mini, tmp_path / "again") == found
    assert first != found
    assert all(f.loss_interval is None for f in first)


def test_killed_at_random_moments_it_ends_with_the_same_table(
    mini_path: Path, finished: tuple[Path, list[Figures]], corpus: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    command: list[Any] = ["chameleon_deploy.compare", "--base", mini_path / "base", "--text", corpus, "--work", work,
                          "--seeds", SEEDS, "--clusters", 3, "--max-length", 40, "--epochs", 2, "--batch-size", 8,
                          "--lr", 2e-2, "--json"]  # fmt: skip
    seed = random.randrange(1000)
    print(f"moments of seed {seed}")  # shown when the test fails
    chance, kills = random.Random(seed), 0
    for wanted in sorted(chance.sample(range(1, 60), 3)):  # so many files are there when it is killed
        process = os.fork()  # not a new process, which would import PyTorch first
        if process == 0:
            try:
                commands.call(*command)
            finally:
                os._exit(0)
        while not (ended := os.waitpid(process, os.WNOHANG)[0]) and sum(1 for _ in _files(work)) < wanted:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        if not ended:
            os.kill(process, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert kills
    last = commands.call(*command)
    assert last.returncode == 0, last.stderr
    printed = [json.loads(line) for line in last.stdout.splitlines()]
    assert printed == nearly(json.loads(json.dumps([dataclasses.asdict(f) for f in finished[1]])))


def _files(work: Path) -> list[Path]:
    try:
        return [path for path in work.rglob("*") if path.is_file()]
    except OSError:  # a directory was renamed meanwhile
        return []


def _shuffled_clusters(patch: pytest.MonkeyPatch) -> None:
    from chameleon_deploy.reference.clustering import nearest_centroids

    patch.setattr(variants, "nearest_centroids", lambda *arguments: nearest_centroids(*arguments).roll(1))


def _swapped_factors(patch: pytest.MonkeyPatch) -> None:
    from chameleon_deploy.reference.checkpoint import load_checkpoint

    def swapped(*arguments: Any, **named: Any) -> Checkpoint:
        checkpoint = load_checkpoint(*arguments, **named)
        if isinstance(checkpoint.factors, Hypernetwork):
            last = checkpoint.factors.linears()[-1]
            last.weight.data, last.bias.data = last.weight.data.flip(0), last.bias.data.flip(0)
        return checkpoint

    patch.setattr(experiment, "load_checkpoint", swapped)


def _shifted_labels(patch: pytest.MonkeyPatch) -> None:
    targets = hidden_states.targets_of
    patch.setattr(hidden_states, "targets_of", lambda ids, *rest: targets([ids[-1], *ids[:-1]], *rest))


@pytest.mark.parametrize("mutate", [_shuffled_clusters, _swapped_factors, _shifted_labels])
def test_mutations_change_the_table(
    mini: Checkpoint,
    finished: tuple[Path, list[Figures]],
    copy_of: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[pytest.MonkeyPatch], None],
) -> None:
    work = copy_of(finished[0])
    for scores in work.rglob("seed-*/*.safetensors"):
        scores.unlink()  # the checkpoints stay: they are scored again, by the mutated code
    assert run(mini, work) == finished[1]  # without a mutation nothing changes
    for scores in work.rglob("seed-*/*.safetensors"):
        scores.unlink()
    mutate(monkeypatch)
    right, wrong = (
        next(row for row in control_sheet(found, "masked").rows if row[1] == "cohort (of 32)")
        for found in (finished[1], run(mini, work))
    )
    assert right[3:5] != wrong[3:5], "loss and perplexity as they are printed"
    if mutate is not _shuffled_clusters:
        assert abs(float(wrong[3].split()[0]) - float(right[3].split()[0])) > 0.05


def _scored(variant: str, conditioning: ConditioningName, losses: list[list[float]]) -> Scored:
    texts = len(losses[0])
    return Scored(variant, "masked", "masked", conditioning, 1, 10 * np.array(losses), np.full(texts, 10),
                  np.arange(texts) % 2)  # fmt: skip


def test_intervals() -> None:
    random_ = np.random.default_rng(0)
    base = random_.normal(3, 0.5, 60)

    def seeds(gain: float) -> list[list[float]]:
        return [list(base - gain + random_.normal(0, 0.01, 60)) for _ in range(4)]

    found = figures(
        [
            _scored("base", "none", [list(base)]),
            _scored("lora", "static", seeds(0.1)),
            _scored("chameleon", "cohort_32", seeds(0.2)),
            _scored("chameleon", "other_cluster", seeds(0.05)),
            _scored("chameleon", "shuffled", seeds(0.2)),
            _scored("chameleon-constant", "constant", seeds(0.2)),
            _scored("lora-large", "static", seeds(0.3)),
        ],
        0,
    )

    def beside(regime: str, conditioning: ConditioningName) -> tuple[float, float]:
        interval = find(found, regime, conditioning, "masked", "masked").beside_chameleon_texts
        assert interval is not None
        return interval

    lora = find(found, "lora", "static", "masked", "masked")
    assert lora.change == pytest.approx(math.expm1(-0.1), abs=0.01)
    assert lora.loss_interval is not None
    assert lora.loss_interval[0] < lora.loss < lora.loss_interval[1]
    assert lora.perplexity_by_cluster.keys() == {0, 1}
    constant = beside("chameleon-constant", "constant")
    assert constant[0] < 0 < constant[1]  # no difference
    assert beside("chameleon", "other_cluster")[0] > 0.15  # worse, by exp(0.15) - 1
    assert beside("lora-large", "static")[1] < -0.09  # better, by 1 - exp(-0.1)


def test_the_bundle_and_the_reference(
    mini_path: Path, bundle: Path, lora_bundle: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_command.main([mini_path], text=[corpus], bundle=bundle, as_json=True)
    *_, reference, ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (ours["regime"], ours["protocol"]) == ("bundle", "masked")
    assert ours["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-4)
    assert ours["perplexity"] != reference["perplexity"]  # another engine, not a copy
    with pytest.raises(CheckFailedError, match="is not this checkpoint"):
        evaluate_command.main([mini_path], text=[corpus], bundle=lora_bundle, as_json=True)


def test_bad_input(mini: Checkpoint, mini_path: Path, corpus: Path, tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.jsonl", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("a\n")
    usual: dict[str, Any] = {"base": str(mini_path / "base"), "work": tmp_path / "w", "clusters": 3, "max_length": 40}
    for arguments, code, message in (
        ({}, "input_invalid", "--text FILE or --dataset NAME"),
        ({"text": [corpus], "dataset": "wikitext"}, "input_invalid", "--text FILE or --dataset NAME"),
        ({"test_text": [corpus], "dataset": "wikitext"}, "input_invalid", "--test-text goes with --text"),
        ({"validation_text": [corpus], "dataset": "wikitext"}, "input_invalid", "--validation-text goes with --text"),
        ({"text": [empty]}, "input_invalid", "holds no text"),
        ({"text": [corpus], "test_text": [short]}, "input_invalid", "at least two tokens"),
        ({"text": [corpus], "max_length": 5000}, "input_invalid", "exceeds the model's 128 positions"),
        ({"text": [corpus], "clusters": 500}, "input_invalid", "--clusters"),
        ({"text": [corpus], "clusters": 1}, "input_invalid", "at least 2 clusters"),
        ({"text": [corpus], "train_texts": 1}, "input_invalid", "too few"),
        ({"text": [corpus], "base": str(tmp_path)}, "checkpoint_invalid", "cannot load a base model"),
    ):
        with pytest.raises(ChameleonError, match=message) as raised:
            compare.main(**(usual | arguments))
        assert raised.value.code == code


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("compare", ["--text", "x", "--work", "w"], "'--base'"),
        ("compare", ["checkpoint", "--text", "x", "--work", "w", "--base", "b"], "unexpected extra argument"),
        ("compare", ["--text", "x", "--work", "w", "--base", "b", "--bundle", "b"], "--bundle"),
        ("evaluate", ["--text", "x"], "'CHECKPOINT'"),
        ("evaluate", ["c", "--text", "x", "--table"], "--table"),
        ("evaluate", ["c", "--text", "x", "--rank", "4"], "--rank"),
        ("evaluate", ["c", "--text", "x", "--html", "page.html"], "--html"),
        ("evaluate", ["c", "d", "--text", "x", "--bundle", "b"], "one checkpoint"),
        ("train", ["--base", "b", "--out", "o", "--dataset", "d", "--validation-text", "v"], "--validation-text goes"),
    ],
)
def test_no_option_is_ignored(command: str, arguments: list[str], message: str) -> None:
    """An option that another command has, or that makes no sense with the others, is an error."""
    result = commands.call(f"chameleon_deploy.{command}", *arguments)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_a_work_directory_holds_one_experiment_and_one_process(
    mini: Checkpoint, finished: tuple[Path, list[Figures]]
) -> None:
    work, _ = finished
    with pytest.raises(InputError, match="other texts, base, protocols or settings"):
        run(mini, work, texts=TEXTS[1:])
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); "
         "fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()", str(work)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout
    holder.stdout.readline()
    with pytest.raises(OutputError, match="another process works in"):
        run(mini, work)
    holder.communicate(b"")
    assert run(mini, work) == finished[1]
