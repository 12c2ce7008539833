"""Clients that share a beginning, on a server of ours and on other engines, each with its own prefix cache on.

    python -m benchmarks.shared_prefix --bundle int8=models/qwen-int8 --server llama.cpp=http://127.0.0.1:8080 \
        --openvino openvino=models/qwen-openvino

Every round has another beginning, and asks each engine for the same texts: all clients at once, one request after the
other each. The order of engines turns from round to round; each figure is the median of the rounds. A `--server` runs
already, and takes prompts of token ids. `--openvino` is a directory of OpenVINO GenAI, whose pipeline runs in this
process: `--convert BASE` writes it (`pip install openvino-genai openvino-tokenizers`).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import numpy as np
import typer

from benchmarks.humaneval import named
from benchmarks.served import SECONDS, served
from chameleon_deploy.bench.peers.openvino import FLOAT32, compressed, stateful_model
from chameleon_deploy.errors import CheckFailedError, InputError
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

OWN_TOKENS = 16  # of each prompt, after the beginning
CACHE_GB = 4  # of OpenVINO's keys and values
IDS = 10, 250  # from and to: tokens that every vocabulary has
PRECISION = "chameleon_deploy_precision"  # in the configuration of a model that `convert` wrote

# Answers prompts [requests][tokens] with so many new tokens each, so many at once.
Answering = Callable[[Sequence[Sequence[int]], int, int], None]


def over_http(url: str) -> Answering:
    """Return a function that asks a server of OpenAI's interface. It raises CheckFailedError for a short answer."""
    client = httpx.Client(base_url=url, timeout=SECONDS)

    def answer(prompts: Sequence[Sequence[int]], new_tokens: int, at_once: int) -> None:
        def ask(prompt: Sequence[int]) -> None:
            body = {"prompt": list(prompt), "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
            usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
            if usage["completion_tokens"] != new_tokens:
                raise CheckFailedError(f"{url} answered {usage['completion_tokens']} tokens, not {new_tokens}")

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(ask, prompts))

    return answer


def openvino(directory: Path, threads: int) -> Answering:
    """Return a function that asks OpenVINO GenAI's ContinuousBatchingPipeline with its prefix cache on."""
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.cache_size = True, CACHE_GB
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    if json.loads((directory / "config.json").read_text())[PRECISION] == "fp32":
        properties |= FLOAT32
    pipeline = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)
    numbers = iter(range(2**62))

    def answer(prompts: Sequence[Sequence[int]], new_tokens: int, at_once: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        waiting, running = list(reversed(prompts)), list[Any]()
        while waiting or running:
            while waiting and len(running) < at_once:
                ids = openvino.Tensor(np.array([waiting.pop()], np.int64))
                running.append(pipeline.add_request(next(numbers), ids, config))
            pipeline.step()
            running = [handle for handle in running if handle.get_status() == genai.GenerationStatus.RUNNING]

    return answer


def convert(base: Path, out: Path, precision: str) -> None:
    """Write a base model as OpenVINO GenAI reads it, in fp32 or, with NNCF's default weights, int8."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import PreTrainedTokenizerFast

    from chameleon_deploy.reference.model import load_trunk

    out.mkdir(parents=True)
    trunk = load_trunk(base)
    model = compressed(stateful_model(trunk), precision)
    openvino.save_model(with_every_logit(model), out / "openvino_model.xml", compress_to_fp16=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trunk.tokenizer)
    for name, each in zip(
        ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
    ):
        openvino.save_model(each, out / f"openvino_{name}.xml")
    (out / "config.json").write_text(json.dumps({**trunk.config.to_dict(), PRECISION: precision}, default=str))


def with_every_logit(model: Any) -> Any:
    """Return a stateful model without the input `logits_positions`: the pipeline wants the logits of all positions."""
    from openvino import opset13 as op

    positions = model.input("logits_positions").get_node()
    width = op.gather(op.shape_of(model.input("input_ids").get_node()), op.constant(1), op.constant(0))
    every = op.range(op.constant(0), op.convert(width, "i32"), op.constant(1), "i64")
    for user in positions.output(0).get_target_inputs():
        user.replace_source_output(every.output(0))
    model.remove_parameter(positions)
    model.validate_nodes_and_infer_types()
    return model


def measure(
    engines: dict[str, Answering], rounds: int, clients: int, each: int, prefix_tokens: int, new_tokens: int
) -> dict[str, list[float]]:
    """Return the tokens per second of each engine in each round, after one that warms up."""
    chance, found = np.random.default_rng(0), {name: list[float]() for name in engines}
    for number in range(rounds + 1):
        prefix = chance.integers(*IDS, prefix_tokens).tolist()
        prompts = [[*prefix, *chance.integers(*IDS, OWN_TOKENS).tolist()] for _ in range(clients * each)]
        names = list(engines)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            engines[name](prompts, new_tokens, clients)
            if number:
                found[name].append(len(prompts) * new_tokens / (time.perf_counter() - start))
    return found


def main(
    bundle: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="A bundle; repeatable.")] = None,
    server: Annotated[list[str] | None, typer.Option(metavar="NAME=URL", help="A running server; repeatable.")] = None,
    openvino_model: Annotated[
        list[str] | None, typer.Option("--openvino", metavar="NAME=DIR", help="A model of OpenVINO GenAI; repeatable.")
    ] = None,
    base: Annotated[Path | None, typer.Option("--convert", help="Write this base model to --out, and end.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to convert to.")] = None,
    precision: Annotated[Literal["fp32", "int8"], typer.Option(help="Of what is converted.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 5,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time, and rows of a bundle's server.")] = 8,
    each: Annotated[int, typer.Option(min=1, help="Requests of a client in a round.")] = 2,
    prefix_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the prompts of a round share.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a bundle's server, and of OpenVINO.")] = 2,
) -> None:
    """Compare engines on prompts that begin alike."""
    if base is not None:
        if out is None:
            raise InputError("--convert needs --out")
        convert(base, out, precision)
        return
    bundles, servers = dict(named("--bundle", bundle)), dict(named("--server", server))
    directories = dict(named("--openvino", openvino_model))
    if not (bundles or servers or directories):
        raise InputError("nothing to ask: pass --bundle, --server or --openvino")
    capacity = prefix_tokens + OWN_TOKENS + new_tokens
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        engines = dict[str, Answering]()
        for name, path in bundles.items():
            url = stack.enter_context(served(Path(path), Path(logs) / f"{name}.log", threads, clients, capacity))
            engines[name] = over_http(url)
        engines |= {name: over_http(url) for name, url in servers.items()}
        engines |= {name: openvino(Path(path), threads) for name, path in directories.items()}
        found = measure(engines, rounds, clients, each, prefix_tokens, new_tokens)
    first = next(iter(found.values()))
    lines = []
    for name, rates in found.items():
        ratios = [ours / theirs for ours, theirs in zip(first, rates, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append([name, f"{statistics.median(rates):.1f}", spread])
    caption = (
        f"{clients} clients, {each} requests of each in a round of {rounds}, {prefix_tokens} common tokens, "
        f"{OWN_TOKENS} others, {new_tokens} new; " + ", ".join(describe_machine().values())
    )
    console.show(Sheet(["engine", "tokens/s", f"{next(iter(found))} beside it"], lines, "Shared prefix", caption))


if __name__ == "__main__":
    console.run(main)
