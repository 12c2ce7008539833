"""`python -m chameleon_deploy.evaluate`: held-out loss and perplexity, as the paper's table gives them, under both
protocols: of checkpoints beside their base, or with --table of the whole experiment, trained here."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from chameleon_deploy import console
from chameleon_deploy.errors import InputError

if TYPE_CHECKING:
    from chameleon_deploy.evaluate.scoring import Evaluation
    from chameleon_deploy.reference.checkpoint import Checkpoint

_TABLE = "With --table"


def main(
    checkpoints: Annotated[list[Path] | None, typer.Argument(help="Checkpoints on one base model.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help='Held-out UTF-8 text, or .jsonl with a "text" field; with --table the training text.'),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Named dataset instead, such as wikitext.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: with --table, or where a checkpoint's has moved.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Score the one checkpoint's exported bundle too; exit 1 where they differ.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per cohort.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap, and of the first training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per row and line.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="Print all columns in one table.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Train and compare base, LoRA, hypernetwork and the controls.")
    ] = False,
    work: Annotated[
        Path | None, typer.Option(help="Directory that keeps what is finished: repeat the command to go on.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind.", rich_help_panel=_TABLE)] = 5,
    validation_text: Annotated[
        list[Path] | None, typer.Option(help="The scored texts; else a fifth of the text.", rich_help_panel=_TABLE)
    ] = None,
    train_texts: Annotated[
        int | None, typer.Option(min=1, help="Train on a sample of so many.", rich_help_panel=_TABLE)
    ] = None,
    validation_texts: Annotated[
        int | None, typer.Option(min=1, help="Score a sample of so many.", rich_help_panel=_TABLE)
    ] = None,
    recipe: Annotated[
        Literal["paper", "residual"],
        typer.Option(help="How hypernetworks come to be; --rank and the rest are told apart.", rich_help_panel=_TABLE),
    ] = "paper",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the factors.", rich_help_panel=_TABLE)] = 4,
    alpha: Annotated[float, typer.Option(help="Scale of the update.", rich_help_panel=_TABLE)] = 1.0,
    clusters: Annotated[int, typer.Option(min=2, help="Number of k-means clusters.", rich_help_panel=_TABLE)] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.", rich_help_panel=_TABLE)] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="At most.", rich_help_panel=_TABLE)] = 10,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate.", rich_help_panel=_TABLE)] = 5e-4,
    patience: Annotated[
        int, typer.Option(min=1, help="Epochs without improvement before stopping.", rich_help_panel=_TABLE)
    ] = 2,
    html: Annotated[Path | None, typer.Option(help="A page with plots, too.", rich_help_panel=_TABLE)] = None,
) -> None:
    """Compare regimes on held-out text: parameters, loss, perplexity, change from the base with its interval."""
    console.check_output(html)
    if bool(text) == bool(dataset):
        raise InputError("pass either --text FILE or --dataset NAME")
    if table:
        if checkpoints or bundle or not base or not work:
            raise InputError("--table trains its own checkpoints: pass --base and --work, no checkpoint and no bundle")
        from chameleon_deploy.evaluate.variants import Experiment

        settings = Experiment(
            recipe=recipe, rank=rank, alpha=alpha, num_clusters=clusters, max_length=max_length, epochs=epochs,
            batch_size=batch_size, lr=lr, patience=patience, seed=seed,
        )  # fmt: skip
        from chameleon_deploy.evaluate.comparison import run_comparison

        texts = _training_and_held_out(text, dataset, validation_text, train_texts, validation_texts, seed)
        run_comparison(base, *texts, settings, seeds, work, as_json, html)
    else:
        if html or work or validation_text or train_texts or validation_texts:
            raise InputError("--html, --work, --validation-text, --train-texts and --validation-texts go with --table")
        _evaluate_checkpoints(
            checkpoints or [], _held_out(text, dataset), base, bundle, batch_size, seed, as_json, wide
        )


def _evaluate_checkpoints(
    checkpoints: list[Path],
    texts: list[str],
    base: str | None,
    bundle: Path | None,
    batch_size: int,
    seed: int,
    as_json: bool,
    wide: bool,
) -> None:
    from chameleon_deploy.evaluate.figures import checkpoint_sheets
    from chameleon_deploy.evaluate.scoring import bootstrap_gain
    from chameleon_deploy.reference.checkpoint import load_checkpoint

    if not checkpoints or (bundle and len(checkpoints) > 1):
        raise InputError("pass a checkpoint (one alone with --bundle), or --table to train and compare all regimes")
    loaded = [load_checkpoint(path, base) for path in checkpoints]
    _require_one_base(checkpoints, loaded)
    found = _evaluate_all(loaded, texts, batch_size)
    if bundle:
        found["masked"].append(_evaluate_bundle(bundle, loaded[0], texts, batch_size, found["masked"][-1]))
    records: list[dict[str, Any]] = []
    for protocol, evaluations in found.items():
        first = evaluations[0]
        for evaluation in evaluations:
            change = None if evaluation is first else bootstrap_gain(evaluation, first, seed)
            records.append(
                {
                    "regime": evaluation.regime,
                    "protocol": protocol,
                    "parameters": evaluation.parameters,
                    "loss": evaluation.loss,
                    "perplexity": evaluation.perplexity,
                    "positions": evaluation.num_positions,
                    "change": evaluation.perplexity / first.perplexity - 1,
                    "change_interval": change,
                    "perplexity_by_cluster": evaluation.perplexity_by_cluster(),
                }
            )
    if as_json:
        for record in records:
            print(json.dumps(record))
    else:
        console.show(*checkpoint_sheets(records, wide))
    if bundle:
        _require_equal(bundle, *(e.perplexity for e in found["masked"][-2:]))


def _held_out(text: list[Path] | None, dataset: str | None) -> list[str]:
    from chameleon_deploy.reference.corpus import load_dataset_texts
    from chameleon_deploy.texts import read_texts

    return load_dataset_texts(dataset, "validation") if dataset else read_texts(text or [])


def _training_and_held_out(
    text: list[Path] | None,
    dataset: str | None,
    validation_text: list[Path] | None,
    train_texts: int | None,
    validation_texts: int | None,
    seed: int,
) -> tuple[list[str], list[str]]:
    from chameleon_deploy.reference.corpus import load_dataset_texts, sample_texts, split_texts
    from chameleon_deploy.texts import read_texts

    if dataset:
        train, held_out = (load_dataset_texts(dataset, split) for split in ("train", "validation"))
    elif validation_text:
        train, held_out = read_texts(text or []), read_texts(validation_text)
    else:
        train, held_out = split_texts(read_texts(text or []), 0.2)
    if not train or not held_out:
        raise InputError("too few texts to hold some out: pass more, or --validation-text FILE")
    return sample_texts(train, train_texts, seed), sample_texts(held_out, validation_texts, seed)


def _require_one_base(paths: list[Path], checkpoints: list[Checkpoint]) -> None:
    import torch

    first = checkpoints[0]
    for path, checkpoint in zip(paths[1:], checkpoints[1:], strict=True):
        if not torch.equal(checkpoint.trunk.token_embedding, first.trunk.token_embedding):
            raise InputError(f"{path} has another base model than {paths[0]}: compare checkpoints of one base")
        if checkpoint.config.max_length != first.config.max_length:
            raise InputError(f"{path} has another max_length than {paths[0]}: their texts would be cut differently")


def _evaluate_all(checkpoints: list[Checkpoint], texts: list[str], batch_size: int) -> dict[str, list[Evaluation]]:
    """Per protocol: the base, then every checkpoint. The hidden states of a protocol are computed once."""
    from chameleon_deploy.bundle import Protocol
    from chameleon_deploy.evaluate.scoring import evaluate

    protocols: tuple[Protocol, ...] = ("paper", "masked")
    found: dict[str, list[Evaluation]] = {}
    total = len(protocols) * (1 + len(checkpoints))
    with TemporaryDirectory() as cache, console.progress() as report:
        for protocol in protocols:
            found[protocol] = [evaluate(checkpoints[0], texts, Path(cache) / protocol, False, protocol, batch_size)]
            for checkpoint in checkpoints:
                report("evaluate", sum(map(len, found.values())), total)
                found[protocol].append(evaluate(checkpoint, texts, Path(cache) / protocol, True, protocol, batch_size))
    return found


def _evaluate_bundle(
    bundle: Path, checkpoint: Checkpoint, texts: list[str], batch_size: int, reference: Evaluation
) -> Evaluation:
    """The same cohorts through the runtime: protocol masked, which is what it scores."""
    from dataclasses import replace

    import numpy as np

    import chameleon_deploy
    from chameleon_deploy.evaluate.scoring import cohort_rows

    runtime = chameleon_deploy.load(bundle)
    ids, cohorts = cohort_rows(checkpoint, texts, batch_size)
    nll = np.zeros(len(ids))
    with console.progress() as report:
        for done, rows in enumerate(cohorts):
            report("evaluate the bundle", done, len(cohorts))
            nll[rows] = [-score.logprob for score in runtime.score([ids[row] for row in rows])]
    return replace(reference, regime="bundle", nll=nll)


def _require_equal(bundle: Path, reference: float, ours: float) -> None:
    from chameleon_deploy.bundle import open_bundle
    from chameleon_deploy.verify.gates import GATES

    difference, limit = abs(ours / reference - 1), GATES[open_bundle(bundle).manifest.precision].perplexity
    console.stderr.print(f"bundle and reference differ by {difference:.1e} in perplexity, limit {limit:g}")
    if not difference <= limit:
        raise console.CheckFailedError(f"{bundle} is not this checkpoint: perplexity {ours:.4f}, not {reference:.4f}")


if __name__ == "__main__":
    console.run(main)
