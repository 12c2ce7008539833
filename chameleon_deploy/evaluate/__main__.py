"""`python -m chameleon_deploy.evaluate`: held-out loss and perplexity of checkpoints and their base, both protocols."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chameleon_deploy.errors import CheckFailedError, InputError
from chameleon_deploy.terminal import console

if TYPE_CHECKING:
    from chameleon_deploy.evaluate.scoring import Evaluation
    from chameleon_deploy.reference.checkpoint import Checkpoint


def main(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT", help="Checkpoints on one base model.")],
    text: Annotated[
        list[Path] | None, typer.Option(help='Held-out text: UTF-8 files, or .jsonl with a "text" field.')
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Named dataset instead, such as wikitext: its split test.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, if a checkpoint's reference to it no longer holds.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Score the checkpoint's exported bundle too; exit 1 if they differ.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per cohort.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per row and line.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="Print all columns in one table.")] = False,
) -> None:
    """Compare checkpoints with their base on held-out text, under both protocols.

    Prints parameters, loss, perplexity, and its change from the base with a 95 % interval.
    """
    from chameleon_deploy.evaluate.figures import checkpoint_sheets
    from chameleon_deploy.evaluate.scoring import bootstrap_gain
    from chameleon_deploy.reference.checkpoint import load_checkpoint

    if bundle and len(checkpoints) > 1:
        raise InputError(f"--bundle {bundle} is compared with one checkpoint: pass it alone, not {len(checkpoints)}")
    texts = _held_out(text, dataset)
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
    from chameleon_deploy.terminal.texts import read_texts, require_one_source

    require_one_source(text, dataset, {})
    return load_dataset_texts(dataset, "test") if dataset else read_texts(text or [])


def _require_one_base(paths: list[Path], checkpoints: list[Checkpoint]) -> None:
    import torch

    first = checkpoints[0]
    for path, checkpoint in zip(paths[1:], checkpoints[1:], strict=True):
        if not torch.equal(checkpoint.trunk.token_embedding, first.trunk.token_embedding):
            raise InputError(f"{path} has another base model than {paths[0]}: compare checkpoints of one base")
        if checkpoint.config.max_length != first.config.max_length:
            raise InputError(f"{path} has another max_length than {paths[0]}: their texts would be cut differently")


def _evaluate_all(checkpoints: list[Checkpoint], texts: list[str], batch_size: int) -> dict[str, list[Evaluation]]:
    """Evaluate, for each protocol, the base and every checkpoint. A protocol's hidden states are computed once."""
    from chameleon_deploy.contract.bundle import Protocol
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
    """Score the same cohorts with the runtime, under protocol masked, which it implements."""
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
    from chameleon_deploy.contract.bundle import open_bundle
    from chameleon_deploy.verify.gates import GATES

    difference, limit = abs(ours / reference - 1), GATES[open_bundle(bundle).manifest.precision].perplexity
    console.stderr.print(f"bundle and reference differ by {difference:.1e} in perplexity, limit {limit:g}")
    if not difference <= limit:
        raise CheckFailedError(f"{bundle} is not this checkpoint: perplexity {ours:.4f}, not {reference:.4f}")


if __name__ == "__main__":
    console.run(main)
