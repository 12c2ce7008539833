"""`python -m chameleon_deploy.bench.load URL|BUNDLE`: send requests and measure their latencies."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.bench.load import comparison, report
from chameleon_deploy.bench.load.figures import Figures, summarize
from chameleon_deploy.bench.load.http import HttpTarget
from chameleon_deploy.bench.load.in_process import EngineTarget, StaticTarget
from chameleon_deploy.bench.load.requests import (
    Request,
    parse_range,
    poisson_arrivals,
    random_requests,
    read_requests,
)
from chameleon_deploy.bench.load.traffic import Record, Steps, Target, closed_loop, open_loop
from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import InputError
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.console import CheckFailedError
from chameleon_deploy.terminal.html_page import Page

ANY_VOCABULARY = 256  # ids that every model has


def main(
    target: Annotated[str, typer.Argument(metavar="URL|BUNDLE", help="An OpenAI-style server, or a bundle directory.")],
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 64,
    streams: Annotated[
        int, typer.Option(min=1, help="Closed loop: each stream sends its next request when its last one ended.")
    ] = 8,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Poisson arrivals, requests per second, instead of a closed loop.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL of {"prompt": text or ids, "max_tokens": n, "model": name}.')
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Without --prompts: a length, or bounds such as 16:256.")] = "128",
    new_tokens: Annotated[str, typer.Option(help="A length, or bounds, of the answers.")] = "64",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random prompts and arrivals.")] = 0,
    model: Annotated[
        list[str] | None, typer.Option(help="Model names of a server, or adaptation modes of a bundle, used in turn.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="BUNDLE: rows in the batch.")] = 8,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="BUNDLE: prompt tokens read between two steps.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="BUNDLE: threads; default: all cores.")] = None,
    static: Annotated[bool, typer.Option(help="BUNDLE: static batches in order of arrival, not the engine.")] = False,
    scenario: Annotated[
        bool, typer.Option(help="BUNDLE: interleaved comparison of the engine with static batches, as ratios.")
    ] = False,
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL",
            help="--scenario: the first serves BUNDLE and takes the engine's place; each "
            "further one is compared with it.",
        ),
    ] = None,
    ragged: Annotated[str, typer.Option(help="--scenario: bounds of the lengths that vary.")] = "16:256",
    rounds: Annotated[int, typer.Option(min=1, help="--scenario: pairs of runs per ratio.")] = 5,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds per request.")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
) -> None:
    """Measure a server or a bundle under load. Exit 1 when a request failed.

    A server's API key is taken from the environment variable OPENAI_API_KEY.
    """
    console.check_output(json_file, html_file)
    lengths = parse_range(prompt_tokens), parse_range(new_tokens)
    page = Page(f"Load on {target}", "chameleon-deploy bench.load") if html_file else None
    is_url = target.startswith(("http://", "https://"))
    if is_url and (static or scenario):
        raise InputError("--static and --scenario run in this process: pass a bundle, not a URL")
    if scenario and (static or rate or prompts or model or html_file or temperature):
        raise InputError("--scenario decides what it sends and how: leave out --static, --rate, --prompts, --model, "
                         "--temperature and --html")  # fmt: skip
    if server and not scenario:
        raise InputError("--server belongs to --scenario; without it, pass the URL in place of the bundle")
    servers = dict(map(_named_server, server or []))
    runtime = None if is_url else chameleon_deploy.load(target, threads=threads)
    if scenario and runtime:
        plan = comparison.Plan(rows, prefill_tokens, lengths[0][1], lengths[1][1], parse_range(ragged),
                               requests, rounds, seed)  # fmt: skip
        _compare(runtime, plan, servers, json_file)
        return
    vocab_size = runtime.manifest.model.vocab_size if runtime else ANY_VOCABULARY
    models: list[str | None] = [*model] if model else [None]
    asked = (
        read_requests(prompts, requests, models) if prompts
        else random_requests(seed, requests, *lengths, vocab_size, models)
    )  # fmt: skip
    arrivals = poisson_arrivals(seed, requests, rate) if rate else None
    opened = _open(target, runtime, static, rows, prefill_tokens, temperature)
    try:
        records, steps = asyncio.run(_run(opened, asked, streams, arrivals, timeout))
    finally:
        if not isinstance(opened, HttpTarget):
            opened.close()
    figures = summarize(records, steps)
    console.show(*report.sheets(figures))
    _write(json_file, asdict(figures))
    if page and html_file:
        report.fill(page, figures, records)
        page.write(html_file)
    _check(figures)


def _open(
    target: str, runtime: Runtime | None, static: bool, rows: int, prefill_tokens: int, temperature: float
) -> HttpTarget | EngineTarget | StaticTarget:
    if runtime is None:
        return HttpTarget(target, os.environ.get("OPENAI_API_KEY"), temperature)
    if static:
        return StaticTarget(runtime, rows, temperature)
    return EngineTarget(runtime, rows, prefill_tokens, temperature)


async def _run(
    target: Target, requests: list[Request], streams: int, arrivals: list[float] | None, timeout: float
) -> tuple[list[Record], Steps | None]:
    """Run the requests, after one request of two tokens that is not counted."""
    if isinstance(target, HttpTarget):
        await target.open()
    await closed_loop(target, [msgspec.structs.replace(requests[0], max_tokens=2)], 1, timeout)
    await target.steps()
    if arrivals is None:
        records = await closed_loop(target, requests, streams, timeout)
    else:
        records = await open_loop(target, requests, arrivals, timeout)
    return records, await target.steps()


def _named_server(text: str) -> tuple[str, HttpTarget]:
    name, _, url = text.partition("=")
    if not name or not url:
        raise InputError(f"--server {text}: pass a name and an address, as python=http://127.0.0.1:8000")
    return name, HttpTarget(url, os.environ.get("OPENAI_API_KEY"))


def _compare(runtime: Runtime, plan: comparison.Plan, servers: dict[str, HttpTarget], json_file: Path | None) -> None:
    with console.progress() as progress:
        ratios = comparison.compare(runtime, plan, progress, servers)
    console.show(comparison.ratio_sheet(ratios))
    _write(json_file, {"plan": asdict(plan), "ratios": [asdict(ratio) for ratio in ratios]})


def _write(json_file: Path | None, content: dict[str, Any]) -> None:
    if json_file:
        encoded = msgspec.json.format(msgspec.json.encode(content), indent=2)
        write_whole(json_file, lambda path: path.write_bytes(encoded + b"\n"))


def _check(figures: Figures) -> None:
    if figures.failed:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in figures.errors.items())
        raise CheckFailedError(f"{figures.failed} of {figures.requests} requests: {reasons}")


if __name__ == "__main__":
    console.run(main)
