"""`python -m chameleon_deploy.train`: train the factors of a frozen base model into a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import InputError
from chameleon_deploy.reference.presets import PRESETS
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


def main(
    base: Base,
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    regime: Annotated[
        Literal["chameleon", "lora"], typer.Option(help="Train a hypernetwork or a plain LoRA.")
    ] = "chameleon",
    protocol: Annotated[
        Literal["masked", "paper"],
        typer.Option(help="Loss over real next tokens, or the loss of the paper's scripts."),
    ] = "masked",
    targets: Targets = None,
    architecture: ArchitectureOption = "paper",
    conditioning: Annotated[
        Literal["embedding", "given"],
        typer.Option(
            help='What the hypernetwork reads: the mean embedding of a batch, or the vector "conditioning" of each '
            ".jsonl line, which callers of the bundle then give too; --clusters is not used."
        ),
    ] = "embedding",
    from_lora: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint of a LoRA (--regime lora) of the same base, targets and rank: a hypernetwork of "
            "architecture paper begins with its factors and learns what each cluster adds."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    text: TrainingText = None,
    validation_text: ValidationText = None,
    dataset: Dataset = None,
    preset: PresetOption = "paper",
    rank: Rank = None,
    alpha: Alpha = None,
    clusters: Clusters = None,
    max_length: MaxLength = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    patience: Patience = None,
    dropout: Dropout = None,
    matmul_precision: MatmulPrecisionOption = "highest",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of initialisation, order and dropout.", rich_help_panel="Training")
    ] = 0,
) -> None:
    """Train the factors of a frozen base model into a checkpoint."""
    vectors = None
    if conditioning == "given":
        train_texts, validation_texts, vectors = _conditioned_texts(regime, text, dataset, validation_text)
    else:
        train_texts, validation_texts = _texts(text, dataset, validation_text)

    import torch

    from chameleon_deploy.reference.checkpoint import CheckpointConfig, load_checkpoint
    from chameleon_deploy.reference.gguf import gguf_file
    from chameleon_deploy.reference.model import load_trunk
    from chameleon_deploy.reference.targets import choose_targets
    from chameleon_deploy.reference.training import TrainingInputs, train_checkpoint

    torch.set_float32_matmul_precision(matmul_precision)
    trunk = load_trunk(base)
    chosen = PRESETS[preset].with_options(
        rank=rank, alpha=alpha, num_clusters=clusters, max_length=max_length,
        epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, seed=seed, architecture=architecture,
        matmul_precision=matmul_precision, dropout=dropout,
        targets=choose_targets(trunk, targets) if targets else None,
    )  # fmt: skip
    config = CheckpointConfig(
        regime=regime,
        base_model=os.path.relpath(base, out) if Path(base).is_dir() or gguf_file(base) else base,
        rank=chosen.rank,
        alpha=chosen.alpha,
        hidden_sizes=chosen.hidden_sizes(chosen.num_clusters) if regime == "chameleon" else (),
        num_clusters=0 if vectors else chosen.num_clusters,
        protocol=protocol,
        max_length=chosen.max_length,
        targets=chosen.targets,
        architecture=chosen.architecture,
        conditioning_size=vectors[0].shape[1] if vectors else 0,
    )
    lora = load_checkpoint(from_lora) if from_lora else None
    with console.progress() as report:
        state = train_checkpoint(
            trunk,
            config,
            TrainingInputs(train_texts, validation_texts, vectors, lora),
            out,
            chosen.training,
            report,
            resume,
        )
    console.stdout.print(f"{out}: best epoch {state.best_epoch}, validation loss {state.best_loss:.4f}")


def _conditioned_texts(
    regime: str, text: list[Path] | None, dataset: str | None, validation_text: list[Path] | None
) -> tuple[list[str], list[str], tuple[FloatArray, FloatArray]]:
    """Return the training and validation texts, and the vectors of each."""
    from chameleon_deploy.terminal.texts import read_conditioned

    if regime == "lora" or dataset or not text or not validation_text:
        raise InputError("--conditioning given goes with a hypernetwork, --text FILE and --validation-text FILE")
    (train, of_train), (validation, of_validation) = read_conditioned(text), read_conditioned(validation_text)
    return train, validation, (of_train, of_validation)


def _texts(
    text: list[Path] | None, dataset: str | None, validation_text: list[Path] | None
) -> tuple[list[str], list[str]]:
    """Return the training and validation texts."""
    from chameleon_deploy.reference.corpus import load_dataset_texts, split_texts
    from chameleon_deploy.terminal.texts import read_texts, require_one_source

    require_one_source(text, dataset, {"--validation-text": validation_text})
    if dataset:
        return load_dataset_texts(dataset, "train"), load_dataset_texts(dataset, "validation")
    texts = read_texts(text or [])
    if validation_text:
        return texts, read_texts(validation_text)
    train, held_out = split_texts(texts, 0.1)
    if not train or not held_out:
        raise InputError(f"{len(texts)} texts are too few to hold some out: pass more, or --validation-text FILE")
    return train, held_out


if __name__ == "__main__":
    console.run(main)
