"""`python -m chameleon_deploy.compare`: train and compare base, LoRA, hypernetwork and controls."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chameleon_deploy.contract.bundle import Protocol
from chameleon_deploy.contract.manifest import LM_HEAD
from chameleon_deploy.reference.presets import PRESETS, Preset
from chameleon_deploy.reference.training_options import (
    Alpha,
    ArchitectureOption,
    Base,
    BatchSize,
    Clusters,
    Dataset,
    Dropout,
    Epochs,
    LearningRate,
    MatmulPrecisionOption,
    MaxLength,
    Patience,
    PresetOption,
    Rank,
    Targets,
    TrainingText,
    ValidationText,
)
from chameleon_deploy.terminal import console

if TYPE_CHECKING:
    from chameleon_deploy.evaluate.experiment import Outcome
    from chameleon_deploy.evaluate.figures import Figures
    from chameleon_deploy.reference.corpus import Split


def main(
    base: Base,
    work: Annotated[Path, typer.Option(help="Directory of finished parts: repeat the command to continue.")],
    text: TrainingText = None,
    validation_text: ValidationText = None,
    test_text: Annotated[
        list[Path] | None,
        typer.Option(help="Test text; default: a fifth of --text, never trained on."),
    ] = None,
    dataset: Dataset = None,
    train_texts: Annotated[int | None, typer.Option(min=1, help="Number of training texts, sampled.")] = None,
    validation_texts: Annotated[int | None, typer.Option(min=1, help="Number of validation texts, sampled.")] = None,
    test_texts: Annotated[int | None, typer.Option(min=1, help="Number of test texts, sampled.")] = None,
    targets: Targets = None,
    architecture: ArchitectureOption = "paper",
    preset: PresetOption = "paper",
    rank: Rank = None,
    alpha: Alpha = None,
    clusters: Clusters = None,
    max_length: MaxLength = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    lora_lr: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Learning rate that LoRAs try; repeatable, the best on the validation text is kept; default: --lr.",
            rich_help_panel="Training",
        ),
    ] = None,
    from_lora: Annotated[
        bool,
        typer.Option(
            "--from-lora",
            help="Let hypernetworks begin with the trained LoRA of their rank, not with the base model.",
            rich_help_panel="Training",
        ),
    ] = False,
    patience: Patience = None,
    dropout: Dropout = None,
    matmul_precision: MatmulPrecisionOption = "highest",
    protocol: Annotated[
        Protocol | None,
        typer.Option(help="Loss of training and scoring; default: both, each in turn.", rich_help_panel="Training"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings of each kind.")] = 5,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the first training; later trainings count up from it.", rich_help_panel="Training"
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per row and line.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.")] = None,
) -> None:
    """Train base, LoRA, hypernetwork and controls with several seeds and compare them on held-out text.

    The same command with the same --work continues a run that was interrupted, and prints a finished one again.
    """
    console.check_output(html)
    started = time.perf_counter()
    import torch

    from chameleon_deploy.evaluate.experiment import PROTOCOLS, Design, run_experiment
    from chameleon_deploy.evaluate.figures import figures
    from chameleon_deploy.evaluate.page import fill
    from chameleon_deploy.reference.model import load_trunk
    from chameleon_deploy.reference.targets import choose_targets
    from chameleon_deploy.terminal.html_page import Page

    torch.set_float32_matmul_precision(matmul_precision)
    trunk = load_trunk(base)
    settings = PRESETS[preset].with_options(
        rank=rank, alpha=alpha, num_clusters=clusters, max_length=max_length,
        epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, seed=seed, architecture=architecture,
        matmul_precision=matmul_precision, dropout=dropout,
        targets=choose_targets(trunk, targets) if targets else None, lora_lrs=tuple(lora_lr or ()),
        from_lora=from_lora,
    )  # fmt: skip
    page = Page(f"Base, LoRA and hypernetwork on {Path(base).name}") if html else None
    texts = _texts(text, dataset, validation_text, test_text, (train_texts, validation_texts, test_texts), seed)
    with console.progress() as report:
        outcome = run_experiment(
            trunk, base, texts, Design(settings, seeds, (protocol,) if protocol else PROTOCOLS), work, report
        )
    all_figures, summary = figures(outcome.scored, seed), _summary(settings, seeds, texts, outcome)
    if page and html:
        fill(page, outcome, all_figures, summary)
        page.write(html)
    if as_json:
        for f in all_figures:
            print(json.dumps(asdict(f)))
    else:
        console.stdout.print(summary)
        _print_tables(all_figures)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    console.stderr.print(f"{time.perf_counter() - started:.0f} s, peak resident memory {peak:.2f} GB")


def _texts(
    text: list[Path] | None,
    dataset: str | None,
    validation_text: list[Path] | None,
    test_text: list[Path] | None,
    samples: tuple[int | None, int | None, int | None],
    seed: int,
) -> Split:
    """Return the training, validation and test splits, each sampled to the given number of texts.

    With --text the validation texts come from the sample.
    """
    from chameleon_deploy.reference.corpus import Split, load_dataset_texts, sample_texts, split_texts
    from chameleon_deploy.terminal.texts import read_texts, require_one_source

    require_one_source(text, dataset, {"--validation-text": validation_text, "--test-text": test_text})
    num_train, num_validation, num_test = samples
    if dataset:
        train, test = load_dataset_texts(dataset, "train"), load_dataset_texts(dataset, "test")
    elif test_text:
        train, test = read_texts(text or []), read_texts(test_text)
    else:
        train, test = split_texts(read_texts(text or []), 0.2)
    train = sample_texts(train, num_train, seed)
    if dataset:
        validation = load_dataset_texts(dataset, "validation")
    elif validation_text:
        validation = read_texts(validation_text)
    else:
        train, validation = split_texts(train, 0.1, "stopping")
    return Split(train, sample_texts(validation, num_validation, seed), sample_texts(test, num_test, seed))


def _summary(settings: Preset, seeds: int, texts: Split, outcome: Outcome) -> str:
    training = settings.training
    layers = "" if settings.targets == (LM_HEAD,) else f"{len(settings.targets)} layers, {settings.architecture}; "
    rates = ", ".join(f"{rate:g}" for rate in settings.lora_lrs)
    precision = "" if training.matmul_precision == "highest" else f", {training.matmul_precision} matmul precision"
    return (
        f"{layers}rank {settings.rank}, alpha {settings.alpha:g}, {settings.num_clusters} clusters, batches of "
        f"{training.batch_size}, at most {settings.max_length} tokens, learning rate {training.lr:g}"
        f"{f' (of LoRAs the best of {rates})' if rates else ''}, "
        f"{'hypernetworks begin with the LoRA, ' if settings.from_lora else ''}dropout {training.dropout:g}, at most "
        f"{training.epochs} epochs{precision}, {seeds} seeds from {training.seed}; {len(texts.train):,} training texts "
        f"({outcome.train_positions:,} positions, {outcome.protocols[-1]}), {len(texts.validation):,} validation "
        f"texts, {len(texts.test):,} test texts"
    )


def _print_tables(all_figures: list[Figures]) -> None:
    from chameleon_deploy.evaluate.figures import cluster_sheet, control_sheet, protocols_of, regime_sheet

    controls = [control_sheet(all_figures, protocol) for protocol in reversed(protocols_of(all_figures))]
    console.show(regime_sheet(all_figures), *controls, cluster_sheet(all_figures))


if __name__ == "__main__":
    console.run(main)
