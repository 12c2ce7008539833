"""Continuous batching beside offline `generate` and static batches: ratios of interleaved runs in one process.

    python -m benchmarks.batching BUNDLE --threads 2
    python -m benchmarks.batching BUNDLE --threads 2 --alone       # rates and latencies of the engine

In a closed loop each of `--rows` streams sends its next request when its last one has ended. Under Poisson arrivals
requests do not wait for each other. Latencies count from when a request was due. Load over HTTP is measured with
guidellm: see benchmarks/README.md.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import chameleon_deploy
from chameleon_deploy import Engine, Runtime, Sampling
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.engine.iteration import Iteration
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet

LOAD = 0.7  # of the engine's capacity, under Poisson arrivals
CANDIDATES = 4  # times as many prompts as are needed, to choose from by their clusters
LINGER = 0.005  # seconds that a static batch waits for more requests after the first
SAMPLING = Sampling(ignore_eos=True)


@dataclass(frozen=True)
class Plan:
    """Sizes of the comparison: rows in the batch, tokens of prompts and answers, requests per run, rounds."""

    rows: int = 8
    prefill_tokens: int = 256
    prompt_tokens: int = 128
    new_tokens: int = 64
    ragged: tuple[int, int] = (16, 256)
    requests: int = 32
    rounds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens are to follow it."""

    prompt: list[int]
    new_tokens: int


@dataclass
class Record:
    """One request. Times are seconds of time.perf_counter.

    due       when it was to be sent
    arrivals  of every token
    """

    request: Request
    due: float
    arrivals: list[float] = field(default_factory=list)


Complete = Callable[[Record], Awaitable[None]]  # sends the request and records its arrivals


@dataclass(frozen=True)
class Ratio:
    """Medians over pairs of adjacent runs.

    name                 both sides of the comparison, and the unit
    values               median of each side
    ratio                first side over the second
    interquartile_range  of the ratio
    """

    name: str
    values: dict[str, float]
    ratio: float
    interquartile_range: tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """Of the engine alone in closed loops: a rate, and the 50th, 90th and 99th percentile of latencies in seconds."""

    tokens_per_second: float
    rows_per_step: float
    first_token: tuple[float, ...]
    inter_token: tuple[float, ...]


async def closed_loop(complete: Complete, requests: Sequence[Request], streams: int) -> list[Record]:
    """Send the requests in `streams` closed loops. Raises what `complete` raises."""
    waiting, records = deque(requests), []

    async def stream() -> None:
        while waiting:
            record = Record(waiting.popleft(), time.perf_counter())
            records.append(record)
            await complete(record)

    await asyncio.gather(*(stream() for _ in range(streams)))
    return records


async def open_loop(complete: Complete, requests: Sequence[Request], arrivals: Sequence[float]) -> list[Record]:
    """Send every request at its time, in seconds from now, however many have not ended."""
    start = time.perf_counter()
    records = [Record(request, start + arrival) for request, arrival in zip(requests, arrivals, strict=True)]

    async def send(record: Record) -> None:
        await asyncio.sleep(max(0.0, record.due - time.perf_counter()))
        await complete(record)

    await asyncio.gather(*map(send, records))
    return records


class StaticBatches:
    """Batches of waiting requests in order of arrival, each generated to its end before the next one begins."""

    def __init__(self, runtime: Runtime, rows: int, mode: Mode | None) -> None:
        self._runtime, self._rows, self._mode = runtime, rows, mode
        self._waiting: deque[tuple[Record, asyncio.Future[None]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def complete(self, record: Record) -> None:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((record, done))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        await done

    async def _run(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._rows:
                await asyncio.sleep(LINGER)
            batch = [self._waiting.popleft() for _ in range(min(self._rows, len(self._waiting)))]
            try:
                await asyncio.to_thread(self._generate, batch, asyncio.get_running_loop())
            except Exception as error:  # each request of the batch raises it
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)

    def _generate(self, batch: list[tuple[Record, asyncio.Future[None]]], loop: asyncio.AbstractEventLoop) -> None:
        requests = [record.request for record, _ in batch]
        tokens = self._runtime.stream(
            [request.prompt for request in requests], max_new_tokens=[request.new_tokens for request in requests],
            sampling=SAMPLING, mode=self._mode,
        )  # fmt: skip
        for token in tokens:
            record, done = batch[token.row]
            record.arrivals.append(time.perf_counter())
            if token.generation is not None:
                loop.call_soon_threadsafe(done.set_result, None)


class Comparison:
    """The engine, static batches and `generate` on one runtime. Close it at the end.

    mode  `centroid` if the bundle has it
    """

    def __init__(self, runtime: Runtime, plan: Plan, report: Progress) -> None:
        """Start the engine. Raises InputError if the model has too few positions for the plan."""
        longest = max(plan.prompt_tokens + plan.new_tokens, 2 * plan.ragged[1])
        if longest > (positions := runtime.manifest.model.max_positions):
            raise InputError(f"the plan needs {longest} positions, the model has {positions}")
        self._runtime, self._plan, self._report = runtime, plan, report
        self._shuffle = random.Random(plan.seed)
        self._steps = self._step_rows = 0
        self._engine = Engine(
            runtime, rows=plan.rows, prefill_tokens=plan.prefill_tokens, max_waiting=100_000, observe=self._observe,
            prefix_cache_bytes=0,  # each pair of runs has the same prompts
        )  # fmt: skip
        self.mode: Mode | None = "centroid" if runtime.manifest.adaptation.regime == "chameleon" else None

    def _observe(self, iteration: Iteration) -> None:
        self._steps += bool(iteration.rows)
        self._step_rows += iteration.rows

    def close(self) -> None:
        self._engine.close(0)

    def ratios(self) -> list[Ratio]:
        plan = self._plan
        equal = self._requests((plan.prompt_tokens,) * 2, (plan.new_tokens,) * 2)
        ragged = self._requests(plan.ragged, plan.ragged)
        ratios = [
            self._ratio("equal lengths, tokens/s", {
                "engine": lambda: _rate(self._continuous(equal)),
                "offline generate": lambda: self._offline(equal),
            }),
            self._ratio("uniform lengths, tokens/s", {
                "engine": lambda: _rate(self._continuous(ragged)),
                "static batches": lambda: _rate(self._static(ragged)),
            }),
        ]  # fmt: skip
        rate = LOAD * ratios[1].values["engine"] / statistics.mean(request.new_tokens for request in ragged)
        arrivals = poisson_arrivals(plan.seed, len(ragged), rate)
        ratios.append(self._ratio(f"Poisson arrivals at {LOAD:.0%} of capacity, p99 of the time to first token, s", {
            "static batches": lambda: _first_token(self._static(ragged, arrivals), 99),
            "engine": lambda: _first_token(self._continuous(ragged, arrivals), 99),
        }))  # fmt: skip
        if self.mode:
            ratios.append(self._ratio("clusters mixed, tokens/s", {
                "engine, centroid": lambda: _rate(self._continuous(equal)),
                "engine, none": lambda: _rate(self._continuous(equal, mode="none")),
            }))  # fmt: skip
        return ratios

    def alone(self) -> Figures:
        """Run the engine in closed loops of equal lengths, after a run that is not counted."""
        plan, seconds = self._plan, 0.0
        requests = self._requests((plan.prompt_tokens,) * 2, (plan.new_tokens,) * 2)
        self._continuous(requests)
        self._steps = self._step_rows = 0
        records: list[Record] = []
        for taken in range(plan.rounds):
            start = time.perf_counter()
            records += self._continuous(requests)
            seconds += time.perf_counter() - start
            self._report("engine alone", taken + 1, plan.rounds)
        gaps = [gap for record in records for gap in np.diff(record.arrivals)]
        return Figures(
            sum(len(record.arrivals) for record in records) / seconds,
            self._step_rows / self._steps,
            tuple(_first_token(records, percent) for percent in (50, 90, 99)),
            tuple(np.percentile(gaps, (50, 90, 99)).tolist()),
        )

    def _ratio(self, name: str, sides: Mapping[str, Callable[[], float]]) -> Ratio:
        """Measure both sides alternately, in random order, after a run of each that is not counted."""
        values: dict[str, list[float]] = {side: [] for side in sides}
        for taken in range(-1, self._plan.rounds):
            order = list(sides)
            self._shuffle.shuffle(order)
            for side in order:
                value = sides[side]()
                if taken >= 0:
                    values[side].append(value)
            self._report(name, taken + 1, self._plan.rounds)
        first, second = values.values()
        ratios = [one / other for one, other in zip(first, second, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        medians = {side: statistics.median(taken) for side, taken in values.items()}
        return Ratio(name, medians, statistics.median(ratios), (low, high))

    def _continuous(
        self, requests: Sequence[Request], arrivals: Sequence[float] | None = None, mode: Mode | None = None
    ) -> list[Record]:
        async def complete(record: Record) -> None:
            stream = self._engine.submit(
                [record.request.prompt], max_new_tokens=record.request.new_tokens, sampling=SAMPLING,
                mode=mode or self.mode,
            )  # fmt: skip
            async for token in stream:
                if token.generation is not None and token.generation.error is not None:
                    raise token.generation.error
                record.arrivals.append(time.perf_counter())

        return self._run(complete, requests, arrivals)

    def _static(self, requests: Sequence[Request], arrivals: Sequence[float] | None = None) -> list[Record]:
        return self._run(StaticBatches(self._runtime, self._plan.rows, self.mode).complete, requests, arrivals)

    def _run(self, complete: Complete, requests: Sequence[Request], arrivals: Sequence[float] | None) -> list[Record]:
        if arrivals is None:
            return asyncio.run(closed_loop(complete, requests, self._plan.rows))
        return asyncio.run(open_loop(complete, requests, arrivals))

    def _offline(self, requests: Sequence[Request]) -> float:
        """Return tokens per second of `generate` on batches of the same requests."""
        start, tokens = time.perf_counter(), 0
        for begin in range(0, len(requests), self._plan.rows):
            batch = requests[begin : begin + self._plan.rows]
            generations = self._runtime.generate(
                [request.prompt for request in batch], max_new_tokens=[request.new_tokens for request in batch],
                sampling=SAMPLING, mode=self.mode,
            )  # fmt: skip
            tokens += sum(len(generation.token_ids) for generation in generations)
        return tokens / (time.perf_counter() - start)

    def _requests(self, prompt_tokens: tuple[int, int], new_tokens: tuple[int, int]) -> list[Request]:
        """Return random requests whose clusters alternate; lengths are uniform between two bounds, inclusive."""
        plan, generator = self._plan, np.random.default_rng(self._plan.seed)
        length, vocab_size = partial(generator.integers, endpoint=True), self._runtime.manifest.model.vocab_size
        found = [
            Request(generator.integers(0, vocab_size, length(*prompt_tokens)).tolist(), int(length(*new_tokens)))
            for _ in range(CANDIDATES * plan.requests)
        ]
        _, cluster_ids = self._runtime.embed([request.prompt for request in found])
        of_cluster: dict[int, list[Request]] = {}
        for request, cluster in zip(found, cluster_ids.tolist(), strict=True):
            of_cluster.setdefault(cluster, []).append(request)
        turns = itertools.zip_longest(*of_cluster.values())
        return [request for turn in turns for request in turn if request is not None][: plan.requests]


def poisson_arrivals(seed: int, count: int, rate: float) -> list[float]:
    """Return the arrival times in seconds, from 0, of a Poisson process of `rate` requests per second."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    gaps[0] = 0.0
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def _rate(records: Sequence[Record]) -> float:
    """Return tokens per second."""
    seconds = max(record.arrivals[-1] for record in records) - min(record.due for record in records)
    return sum(len(record.arrivals) for record in records) / seconds


def _first_token(records: Sequence[Record], percent: float) -> float:
    """Return a percentile of the seconds to the first token."""
    return float(np.percentile([record.arrivals[0] - record.due for record in records], percent))


def ratio_sheet(ratios: Sequence[Ratio]) -> Sheet:
    rows = [
        [
            ratio.name,
            *(f"{name}: {value:.4g}" for name, value in ratio.values.items()),
            f"{ratio.ratio:.3f}",
            "{:.3f} to {:.3f}".format(*ratio.interquartile_range),
        ]
        for ratio in ratios
    ]
    return Sheet(["", "one side", "the other", "ratio", "interquartile range"], rows)


def figures_sheet(figures: Figures) -> Sheet:
    first, gap = (
        " / ".join(f"{1e3 * value:.0f}" for value in values) for values in (figures.first_token, figures.inter_token)
    )
    return Sheet(
        ["tokens/s", "rows per step", "time to first token, p50 / p90 / p99, ms", "between tokens, likewise, ms"],
        [[f"{figures.tokens_per_second:.1f}", f"{figures.rows_per_step:.2f}", first, gap]],
    )


def parse_range(text: str) -> tuple[int, int]:
    """Parse `16:256` into the least and the greatest length. Raises InputError."""
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high)
    except ValueError:
        raise InputError(f"{text!r} are no bounds: pass two lengths, as in 16:256") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise InputError(f"{text!r}: pass lengths of at least 1, the lower one first")
    return bounds


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests per run.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="Rows in a batch, and streams of a closed loop.")] = 8,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens read between two steps.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens, where lengths are equal.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, where lengths are equal.")] = 64,
    ragged: Annotated[str, typer.Option(help="Bounds of prompts and answers, where lengths vary.")] = "16:256",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs per ratio.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and arrivals.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: all cores.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Only the engine: its rates and latencies.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON to this file.")] = None,
) -> None:
    """Compare the engine with offline generation and with static batches in order of arrival."""
    console.check_output(json_file)
    plan = Plan(rows, prefill_tokens, prompt_tokens, new_tokens, parse_range(ragged), requests, rounds, seed)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    with console.progress() as progress, closing(Comparison(runtime, plan, progress)) as comparison:
        if alone:
            figures = comparison.alone()
            sheet, record = figures_sheet(figures), asdict(figures)
        else:
            ratios = comparison.ratios()
            sheet, record = ratio_sheet(ratios), {"ratios": [asdict(ratio) for ratio in ratios]}
    console.show(sheet)
    if json_file:
        console.write_json({"plan": asdict(plan), **record}, json_file)


if __name__ == "__main__":
    console.run(main)
