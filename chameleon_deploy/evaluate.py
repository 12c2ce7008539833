"""`python -m chameleon_deploy.evaluate`: held-out loss and perplexity of checkpoints, beside their base, as the paper's
table gives them, under both protocols."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from chameleon_deploy import console
from chameleon_deploy.errors import InputError

if TYPE_CHECKING:
    from chameleon_deploy.reference.checkpoint import Checkpoint
    from chameleon_deploy.reference.evaluation import Evaluation


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints on one base model.")],
    text: Annotated[list[Path] | None, typer.Option(help='Held-out UTF-8 text, or .jsonl with a "text" field.')] = None,
    dataset: Annotated[str | None, typer.Option(help="Named dataset instead; its validation split is scored.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoints' own reference has moved.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per cohort.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per regime, protocol and line.")] = False,
) -> None:
    """Compare regimes on held-out text: parameters, loss, perplexity, change from the base with its interval."""
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.reference.evaluation import bootstrap_gain

    texts = _texts(text, dataset)
    loaded = [load_checkpoint(path, base) for path in checkpoints]
    _require_one_base(checkpoints, loaded)
    records: list[dict[str, Any]] = []
    for protocol, evaluations in _evaluate_all(loaded, texts, batch_size).items():
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
        console.stdout.print(_table(records))


def _texts(text: list[Path] | None, dataset: str | None) -> list[str]:
    from chameleon_deploy.reference.corpus import load_dataset_texts
    from chameleon_deploy.texts import read_texts

    if bool(text) == bool(dataset):
        raise InputError("pass either --text FILE or --dataset NAME")
    return load_dataset_texts(dataset, "validation") if dataset else read_texts(text or [])


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
    from chameleon_deploy.reference.checkpoint import Protocol
    from chameleon_deploy.reference.evaluation import evaluate

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


def _table(records: list[dict[str, Any]]) -> Table:
    clusters = sorted({c for record in records for c in record["perplexity_by_cluster"]})
    table = Table("protocol", "regime", "parameters", "loss", "perplexity", "positions", "change", "95 % interval",
                  *(f"cluster {c}" for c in clusters))  # fmt: skip
    for record in records:
        interval = record["change_interval"]
        by_cluster = record["perplexity_by_cluster"]
        table.add_row(
            record["protocol"], record["regime"], f"{record['parameters']:,}", f"{record['loss']:.4f}",
            f"{record['perplexity']:.4f}", f"{record['positions']:,}",
            f"{record['change']:+.2%}" if interval else "",
            f"{interval[0]:+.2%} to {interval[1]:+.2%}" if interval else "",
            *(f"{by_cluster[c]:.2f}" if c in by_cluster else "" for c in clusters),
            end_section=record is records[len(records) // 2 - 1],
        )  # fmt: skip
    return table


if __name__ == "__main__":
    console.run(main)
