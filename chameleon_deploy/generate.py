"""`python -m chameleon_deploy.generate`: continue prompts with a bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

import chameleon_deploy
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime import Sampling
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
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Prompts from a file: paragraphs, or .jsonl with "text".')
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="Adaptation mode.")] = None,
    tenant: Annotated[list[str] | None, typer.Option(help="Mode tenant: one per prompt, in order.")] = None,
    adapter: AdapterNames = None,
    load_adapter: LoadedAdapters = None,
    adapt_text: Descriptions = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Per prompt.")] = 20,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 changes nothing.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal tokens.")] = 0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of generated tokens.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, times the token's count.")] = 0.0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=VALUE", help="Added to a token's logit; may be given several times.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, and those of 0 to 20 alternatives.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this string; may be given several times.")] = None,
    prompt_lookup_num_tokens: Annotated[
        int, typer.Option(min=0, help="Draft up to this many tokens from the text so far; in fp32, on the CPU.")
    ] = 0,
    provider: Annotated[str, typer.Option(help="cpu, cuda, tensorrt or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime.")] = None,
    trusted_key: Annotated[
        list[Path] | None, typer.Option(help="Refuse a bundle that this Ed25519 public key (PEM) did not sign.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt and line.")] = False,
) -> None:
    """Continue prompts. They form one batch, which the cohort and tenant modes adapt to as a whole."""
    if not prompt and not prompts:
        raise InputError("nothing to continue: pass --prompt TEXT or --prompts FILE")
    texts = [*(prompt or []), *(read_texts([prompts]) if prompts else [])]
    sampling = Sampling(
        temperature, top_k, top_p, repetition_penalty, seed, stop=tuple(stop or ()), presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, logit_bias=dict(map(_bias, logit_bias or ())), logprobs=logprobs,
    )  # fmt: skip
    path = console.bundle_path(bundle)
    runtime = chameleon_deploy.load(path, provider=provider, mode=mode, threads=threads, trusted_keys=trusted_key)
    console.tell_provider(provider, runtime.provider)
    for name, source in paths_by_name(load_adapter).items():
        runtime.load_adapter(name, source)
    generations = runtime.generate(
        texts, max_new_tokens=max_new_tokens, sampling=sampling, tenants=tenant,
        adapters=adapters_of_texts(adapter, len(texts)), adapt_text=descriptions_of_texts(adapt_text, len(texts)),
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
    )  # fmt: skip
    if as_json:
        for generation in generations:
            record = {name: value for name, value in dataclasses.asdict(generation).items() if value is not None}
            print(json.dumps(record))
        return
    rows = [[str(g.cluster_id), text, g.text, g.finish_reason] for text, g in zip(texts, generations, strict=True)]
    console.show(Sheet(["cluster", "prompt", "text", "finish"], rows, sections=range(len(rows))))


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise InputError(f"--logit-bias {text}: pass ID=VALUE, a token id and a number from -100 to 100") from None


if __name__ == "__main__":
    console.run(main)
