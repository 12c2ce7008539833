"""`python -m chameleon_deploy.score`: log-probability and perplexity of texts under a bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

import chameleon_deploy
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime import Score
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.adapter_options import (
    AdapterNames,
    Descriptions,
    LoadedAdapters,
    adapters_of_texts,
    descriptions_of_texts,
    paths_by_name,
)
from chameleon_deploy.terminal.table import Sheet
from chameleon_deploy.terminal.texts import read_texts


def main(
    bundle: console.BundleArgument,
    text: Annotated[list[Path], typer.Option(help='Texts from files: paragraphs, or .jsonl with "text".')],
    mode: Annotated[Mode | None, typer.Option(help="Adaptation mode.")] = None,
    tenant: Annotated[list[str] | None, typer.Option(help="Mode tenant: one per text, in order.")] = None,
    adapter: AdapterNames = None,
    load_adapter: LoadedAdapters = None,
    adapt_text: Descriptions = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch: what cohort and tenant adapt to.")] = 32,
    provider: Annotated[str, typer.Option(help="cpu, cuda, tensorrt or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime.")] = None,
    trusted_key: Annotated[
        list[Path] | None, typer.Option(help="Refuse a bundle that this Ed25519 public key (PEM) did not sign.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per text and line.")] = False,
) -> None:
    """Score texts in batches, in the order of the files."""
    texts = read_texts(text)
    path = console.bundle_path(bundle)
    runtime = chameleon_deploy.load(path, provider=provider, mode=mode, threads=threads, trusted_keys=trusted_key)
    console.tell_provider(provider, runtime.provider)
    for name, source in paths_by_name(load_adapter).items():
        runtime.load_adapter(name, source)
    scores: list[Score] = []
    adapters, descriptions = adapters_of_texts(adapter, len(texts)), descriptions_of_texts(adapt_text, len(texts))
    with console.progress() as report:
        for start in range(0, len(texts), batch_size):
            batch = slice(start, start + batch_size)
            scores += runtime.score(
                texts[batch],
                tenants=tenant[batch] if tenant else None,
                adapters=adapters[batch] if adapters else None,
                adapt_text=descriptions[batch] if descriptions else None,
            )
            report("texts scored", len(scores), len(texts))
    if as_json:
        for score in scores:
            print(json.dumps(_record(score)))
        return
    rows = [
        [str(score.cluster_id), str(len(score.token_ids)), f"{score.logprob:.3f}", f"{score.perplexity:.2f}",
         " ".join(text.split())[:60]]
        for text, score in zip(texts, scores, strict=True)
    ]  # fmt: skip
    console.show(Sheet(["cluster", "tokens", "log-probability", "perplexity", "text"], rows))
    count = sum(len(score.token_logprobs) for score in scores)
    if count:
        mean = math.fsum(score.logprob for score in scores) / count
        console.stdout.print(f"{count} tokens, perplexity {math.exp(-mean):.4f}")


def _record(score: Score) -> dict[str, Any]:
    return {
        "token_ids": score.token_ids,
        "token_logprobs": score.token_logprobs,
        "cluster_id": score.cluster_id,
        "logprob": score.logprob,
        "perplexity": score.perplexity if score.token_logprobs else None,
    }


if __name__ == "__main__":
    console.run(main)
