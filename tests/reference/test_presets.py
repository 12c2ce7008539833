"""The preset in which conditioning pays: it starts as it says, and it pays where it must."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from chameleon_deploy import compare
from chameleon_deploy import train as train_command
from chameleon_deploy.contract.bundle import TargetSpec
from chameleon_deploy.errors import InputError
from chameleon_deploy.evaluate import variants
from chameleon_deploy.evaluate.experiment import Design, run_experiment
from chameleon_deploy.evaluate.variants import VARIANTS
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig, load_checkpoint
from chameleon_deploy.reference.clustering import nearest_centroids
from chameleon_deploy.reference.corpus import Split, split_texts
from chameleon_deploy.reference.fit import TrainingData, fit, validation_loss
from chameleon_deploy.reference.head_losses import HeadLosses
from chameleon_deploy.reference.hidden_states import HiddenStates
from chameleon_deploy.reference.hypernetwork import FactorModule, Hypernetwork, StaticLoRA, num_parameters
from chameleon_deploy.reference.presets import PAPER, PRESETS, PresetName, TrainingSettings, default_of
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.residual import add_residual, constant_direction, count, detectors, log_ratio
from chameleon_deploy.reference.training import TrainingInputs, train_checkpoint
from tests.commands import call

CLUSTERS, HIDDEN, VOCAB, RANK = 4, 16, 40, 2
CENTROIDS = torch.nn.functional.normalize(torch.randn(CLUSTERS, HIDDEN, generator=torch.Generator().manual_seed(9)))


def synthetic_states(seed: int, texts: int = 120, length: int = 12) -> HiddenStates:
    """Texts of 4 kinds with 4 different distributions of the next token, and hidden states that say nothing of it."""
    random = torch.Generator().manual_seed(seed)
    kinds = torch.arange(texts) % CLUSTERS
    embeddings = torch.nn.functional.normalize(
        CENTROIDS[kinds] + 0.05 * torch.randn(texts, HIDDEN, generator=random), dim=1
    )
    # Every kind keeps to its own quarter of the vocabulary, 9 times out of 10.
    own = kinds[:, None] * (VOCAB // CLUSTERS) + torch.randint(0, VOCAB // CLUSTERS, (texts, length), generator=random)
    anywhere = torch.randint(0, VOCAB, (texts, length), generator=random)
    targets = torch.where(torch.rand(texts, length, generator=random) < 0.9, own, anywhere)
    hidden = torch.randn(texts * length, HIDDEN, generator=random)
    hidden[:, 0] = 3.0  # what a factor needs to shift all logits of a token
    offsets = np.arange(0, texts * length + 1, length)
    return HiddenStates(hidden.numpy(), targets.flatten().numpy(), offsets, embeddings)


HEAD = 0.1 * torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(8))
TARGETS = [TargetSpec("lm_head", HIDDEN, VOCAB)]


def losses_of(seed: int, alpha: float = 1.0) -> HeadLosses:
    return HeadLosses(synthetic_states(seed), HEAD, alpha)


def train(factors: FactorModule, settings: TrainingSettings, work: Path) -> float:
    work.mkdir(exist_ok=True)
    return fit(factors, TrainingData(losses_of(1), losses_of(2), CENTROIDS), settings, work).best_loss


def small_lora(seed: int = 0, rank: int = RANK - 1) -> StaticLoRA:
    torch.manual_seed(seed)
    return StaticLoRA(TARGETS, rank)


def with_residual(lora: StaticLoRA, alpha: float = 1.0) -> tuple[Hypernetwork, dict[float, float]]:
    return add_residual(lora, losses_of(1, alpha), losses_of(2, alpha), CENTROIDS, 8)


def test_a_detector_is_one_at_its_own_centroid_and_zero_at_the_others() -> None:
    weight, bias = detectors(synthetic_states(1).embeddings.double(), CENTROIDS.double())

    def detected(conditioning: Tensor) -> Tensor:
        return torch.relu(conditioning @ weight.float().T + bias.float())

    torch.testing.assert_close(detected(CENTROIDS), torch.eye(CLUSTERS), rtol=0, atol=1e-5)
    # A single text is noisier than a centroid; its own detector still answers loudest.
    embeddings = synthetic_states(3).embeddings
    assert torch.equal(detected(embeddings).argmax(1), nearest_centroids(embeddings, CENTROIDS))


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_the_hypernetwork_is_the_lora_and_the_counted_correction(alpha: float) -> None:
    """Folding everything into three Linear layers changes nothing: at a centroid they give LoRA and log ratio."""
    lora, states = small_lora(), synthetic_states(1)
    hypernetwork, losses = with_residual(lora, alpha)
    expected, observed = count(lora, losses_of(1, alpha), CENTROIDS)
    ratio = log_ratio(expected, observed, min(losses, key=losses.__getitem__))
    lora_A, lora_B = hypernetwork(CENTROIDS).values()
    h = torch.from_numpy(states.hidden[:50])
    for k in range(CLUSTERS):
        found = alpha * (h @ lora_A[k].T) @ lora_B[k].T
        shared = alpha * (h @ lora.lora_A[0].T) @ lora.lora_B[0].T
        torch.testing.assert_close(found, (shared + (h @ constant_direction(states))[:, None] * ratio[k]).detach())
    assert float((h @ constant_direction(states) - 1).abs().mean()) < 0.1
    assert observed.sum() == len(states.targets)
    torch.testing.assert_close(expected.sum(1), observed.sum(1))


def test_no_correction_where_none_helps() -> None:
    """Validation texts whose kinds say the opposite of the training texts': the counts must not be used."""
    validation = losses_of(2)
    validation.states.embeddings = validation.embeddings.roll(1, 0)  # of the next text, which is of the next kind
    hypernetwork, losses = add_residual(small_lora(), losses_of(1), validation, CENTROIDS, 8)
    assert min(losses, key=losses.__getitem__) == math.inf
    assert not hypernetwork.linears()[-1].weight.any()


def test_conditioning_pays_where_it_must(tmp_path: Path) -> None:
    """Against a LoRA of as many parameters, and against itself fed the conditioning of other texts."""
    settings = PRESETS["residual"].with_options(epochs=30, lr=1e-2).training
    lora = small_lora()
    shared = train(lora, settings, tmp_path / "shared")
    hypernetwork, _ = with_residual(lora)
    large = small_lora(rank=num_parameters(hypernetwork) // (HIDDEN + VOCAB))
    control = min(shared, train(large, settings, tmp_path / "large"))
    held_out = losses_of(3)

    def loss(factors: FactorModule) -> float:
        return validation_loss(factors, held_out, CENTROIDS, settings.batch_size)

    adapted = loss(hypernetwork)
    assert adapted < min(loss(lora), loss(large), control) - 0.5
    held_out.states.embeddings = held_out.embeddings.roll(1, 0)
    assert loss(hypernetwork) > adapted + 1


def test_steps_that_see_several_cohorts_weigh_every_position_alike(tmp_path: Path) -> None:
    """One step over everything is the gradient of everything, however it is cut into cohorts."""
    found = []
    for cohorts_per_step, batch_size in ((4, 120), (1000, 7)):
        torch.manual_seed(0)
        lora = StaticLoRA(TARGETS, RANK)
        settings = PAPER.with_options(epochs=1, batch_size=batch_size, cohorts_per_step=cohorts_per_step).training
        train(lora, settings, tmp_path / str(batch_size))
        found.append(lora.lora_B[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_train_and_compare_resolve_a_preset_alike(
    preset: PresetName, mini_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("chameleon_deploy.reference.training.train_checkpoint", stop)
    monkeypatch.setattr("chameleon_deploy.evaluate.experiment.run_experiment", stop)
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join(map(str, range(100))))
    options: dict[str, Any] = {"base": str(mini_path / "base"), "text": [text], "preset": preset, "lr": 0.125}
    for command, more in ((train_command, {"out": tmp_path / "out"}), (compare, {"work": tmp_path / "work"})):
        with pytest.raises(KeyboardInterrupt):
            command.main(**options, **more)
    (_, config, _, _, training, *_), (_, _, _, design, *_) = calls
    settings = design.settings
    assert settings == PRESETS[preset].with_options(lr=0.125)
    assert training == settings.training
    shape = settings.rank, settings.alpha, settings.num_clusters, settings.max_length
    assert (config.rank, config.alpha, config.num_clusters, config.max_length) == shape


def test_the_help_names_the_defaults() -> None:
    assert default_of("rank") == "paper: 4, residual: 16"
    assert default_of("epochs") == "10"


def test_the_preset_from_text_to_bundle(mini_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.jsonl"
    texts = [text for kind in KINDS for text in python_texts(kind, 16)]
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    result = call("chameleon_deploy.train", "--base", mini_path / "base", "--text", text, "--out", tmp_path / "out",
                  "--max-length", 48, "--preset", "residual", "--clusters", 5, "--epochs", 2)  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["settings"] == asdict(PRESETS["residual"].with_options(epochs=2).training)
    assert record["best_loss"] == min(record["validation_loss_by_pseudo_count"].values())
    checkpoint = load_checkpoint(tmp_path / "out", base=str(mini_path / "base"))
    assert checkpoint.config.hidden_sizes == (5, 5)
    export_bundle(checkpoint, tmp_path / "bundle")  # raises where a gate is missed


def test_hidden_sizes_that_are_not_the_clusters(mini: Checkpoint, tmp_path: Path) -> None:
    config = CheckpointConfig(regime="chameleon", base_model="./base", rank=4, hidden_sizes=(5, 4), num_clusters=4)
    with pytest.raises(InputError, match="one unit per cluster"):
        train_checkpoint(
            mini.trunk, msgspec.structs.replace(config, max_length=48), TrainingInputs(["a text"], ["a text"]),
            tmp_path / "out", PRESETS["residual"].training, lambda what, done, total: None,
        )  # fmt: skip


def test_the_comparison_takes_the_preset(mini: Checkpoint, tmp_path: Path) -> None:
    texts = [text for kind in KINDS for text in python_texts(kind, 12)]
    settings = PRESETS["residual"].with_options(rank=4, num_clusters=3, max_length=40, epochs=1, lr=2e-2)
    train, test = split_texts(texts, 0.2)
    splits = Split(*split_texts(train, 0.2, "validation"), test)
    run_experiment(mini.trunk, "base", splits, Design(settings, 1), tmp_path, lambda what, done, total: None)
    for variant, units in (("chameleon", 3), ("chameleon-constant", 1)):
        checkpoint = load_checkpoint(tmp_path / "masked" / "seed-0" / variant, trunk=mini.trunk)
        assert checkpoint.config.hidden_sizes == (units, units)
        shape = next(v for v in VARIANTS if v.name == variant)
        assert num_parameters(checkpoint.factors) == variants.num_parameters(mini.trunk, settings, shape)
