"""`python -m chameleon_deploy.train`: train the head of a frozen base model into a checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from chameleon_deploy import console
from chameleon_deploy.errors import InputError


def main(
    base: Annotated[str, typer.Option(help="Base model: a Hugging Face directory or hub id, or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    text: Annotated[list[Path] | None, typer.Option(help='UTF-8 text files, or .jsonl with a "text" field.')] = None,
    dataset: Annotated[str | None, typer.Option(help="Named dataset instead of files, such as wikitext.")] = None,
    validation_text: Annotated[
        list[Path] | None, typer.Option(help="Held-out files; else a tenth of the text.")
    ] = None,
    regime: Annotated[Literal["chameleon", "lora"], typer.Option(help="What to train.")] = "chameleon",
    protocol: Annotated[
        Literal["masked", "paper"], typer.Option(help="Next token over real tokens, or the paper's scripts' loss.")
    ] = "masked",
    recipe: Annotated[
        Literal["paper", "residual"],
        typer.Option(help="What the options below are when left out, and how the hypernetwork starts."),
    ] = "paper",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the factors.")] = None,
    alpha: Annotated[float, typer.Option(help="Scale of the update.")] = 1.0,
    clusters: Annotated[int | None, typer.Option(min=1, help="Number of k-means clusters.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 256,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts per step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Epochs without improvement before stopping.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, order and dropout.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
) -> None:
    """Train the head factors of a frozen base model into a checkpoint."""
    train_texts, validation_texts = _texts(text, dataset, validation_text)

    from chameleon_deploy.reference.checkpoint import CheckpointConfig
    from chameleon_deploy.reference.gguf import gguf_file
    from chameleon_deploy.reference.model import load_trunk
    from chameleon_deploy.reference.presets import RECIPES
    from chameleon_deploy.reference.training import train_checkpoint

    chosen = RECIPES[recipe]
    clusters = clusters or chosen.num_clusters
    config = CheckpointConfig(
        regime=regime,
        base_model=os.path.relpath(base, out) if Path(base).is_dir() or gguf_file(base) else base,
        rank=rank or chosen.rank,
        alpha=alpha,
        hidden_sizes=chosen.hidden_sizes(clusters) if regime == "chameleon" else (),
        num_clusters=clusters,
        protocol=protocol,
        max_length=max_length,
    )
    usual = chosen.settings
    settings = replace(
        usual,
        epochs=epochs or usual.epochs,
        batch_size=batch_size or usual.batch_size,
        lr=usual.lr if lr is None else lr,
        patience=patience or usual.patience,
        seed=seed,
    )
    trunk = load_trunk(base)
    with console.progress() as report:
        state = train_checkpoint(trunk, config, train_texts, validation_texts, out, settings, report, resume)
    console.stdout.print(f"{out}: best epoch {state.best_epoch}, validation loss {state.best_loss:.4f}")


def _texts(
    text: list[Path] | None, dataset: str | None, validation_text: list[Path] | None
) -> tuple[list[str], list[str]]:
    from chameleon_deploy.reference.corpus import load_dataset_texts, split_texts
    from chameleon_deploy.texts import read_texts

    if bool(text) == bool(dataset):
        raise InputError("pass either --text FILE or --dataset NAME")
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
