"""Ratios of an engine or a server to static batches and to other servers: interleaved runs of one process."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.bench.load.figures import Figures, summarize
from chameleon_deploy.bench.load.http import HttpTarget
from chameleon_deploy.bench.load.in_process import EngineTarget, StaticTarget, mode_of, prompts_of
from chameleon_deploy.bench.load.requests import Request, poisson_arrivals, random_requests
from chameleon_deploy.bench.load.traffic import Target, closed_loop, open_loop
from chameleon_deploy.errors import InputError
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet

LOAD = 0.7  # of the engine's capacity, under Poisson arrivals
TIMEOUT = 600.0  # seconds per request
CANDIDATES = 4  # times as many prompts as are needed, to choose from by their clusters


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


def compare(
    runtime: Runtime, plan: Plan, report: Progress, servers: Mapping[str, HttpTarget] | None = None
) -> list[Ratio]:
    """Run every comparison.

    servers  by the names they get in the ratios: the first one serves the same bundle and takes the place of the
             engine in this process; each of the others is compared with it

    Raises InputError if the model has too few positions for the plan, or if a server does not answer.
    """
    longest = max(plan.prompt_tokens + plan.new_tokens, 2 * plan.ragged[1])
    if longest > runtime.manifest.model.max_positions:
        raise InputError(f"the plan needs {longest} positions, the model has {runtime.manifest.model.max_positions}")
    for server in (servers or {}).values():
        asyncio.run(server.open())
    comparison = _Comparison(runtime, plan, report, servers or {})
    try:
        return comparison.run()
    finally:
        comparison.close()


class _Comparison:
    def __init__(self, runtime: Runtime, plan: Plan, report: Progress, servers: Mapping[str, HttpTarget]) -> None:
        self._runtime, self._plan, self._report = runtime, plan, report
        self._shuffle = random.Random(plan.seed)
        self._serving: dict[str, HttpTarget | EngineTarget] = {**servers}
        if not servers:
            self._serving["engine"] = EngineTarget(runtime, plan.rows, plan.prefill_tokens)
        self._static_target = StaticTarget(runtime, plan.rows)

    def close(self) -> None:
        for target in self._serving.values():
            if isinstance(target, EngineTarget):
                target.close()
        self._static_target.close()

    def run(self) -> list[Ratio]:
        plan, (first, *others) = self._plan, self._serving
        equal = self._mixed((plan.prompt_tokens,) * 2, (plan.new_tokens,) * 2)
        ragged = self._mixed(plan.ragged, plan.ragged)
        ratios = [
            self._ratio("equal lengths, tokens/s", {
                first: lambda: self._rate(first, equal),
                "offline generate": lambda: self._offline(equal),
            }),
            self._ratio("uniform lengths, tokens/s", {
                first: lambda: self._rate(first, ragged),
                "static batches": lambda: self._static(ragged).tokens_per_second,
            }),
        ]  # fmt: skip
        rate = LOAD * ratios[1].values[first] / statistics.mean(request.max_tokens for request in ragged)
        arrivals = poisson_arrivals(plan.seed, len(ragged), rate)
        ratios.append(self._ratio(f"Poisson arrivals at {LOAD:.0%} of capacity, p99 of the time to first token, s", {
            "static batches": lambda: _p99(self._static(ragged, arrivals)),
            first: lambda: _p99(self._serve(first, ragged, arrivals)),
        }))  # fmt: skip
        base = [Request(request.prompt, request.max_tokens, "none") for request in equal]
        if self._runtime.manifest.adaptation.regime == "chameleon":
            ratios.append(self._ratio("clusters mixed, tokens/s", {
                f"{first}, centroid": lambda: self._rate(first, equal),
                f"{first}, none": lambda: self._rate(first, base),
            }))  # fmt: skip
        ratios.extend(
            self._ratio("equal lengths, base model, tokens/s", {
                name: partial(self._rate, name, base) for name in (first, other)
            }) for other in others
        )  # fmt: skip
        return ratios

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

    def _rate(self, name: str, requests: Sequence[Request]) -> float:
        """Return tokens per second."""
        return self._serve(name, requests).tokens_per_second

    def _serve(self, name: str, requests: Sequence[Request], arrivals: Sequence[float] | None = None) -> Figures:
        target = self._serving[name]
        if isinstance(target, HttpTarget):
            requests = [msgspec.structs.replace(request, model=target.model_of(request.model)) for request in requests]
        return self._run(target, requests, arrivals)

    def _static(self, requests: Sequence[Request], arrivals: Sequence[float] | None = None) -> Figures:
        return self._run(self._static_target, requests, arrivals)

    def _run(self, target: Target, requests: Sequence[Request], arrivals: Sequence[float] | None) -> Figures:
        """Run the requests. Raises InputError if one failed, since the figures would compare different work."""
        if arrivals is None:
            work = closed_loop(target, requests, self._plan.rows, TIMEOUT)
        else:
            work = open_loop(target, requests, arrivals, TIMEOUT)
        figures = summarize(asyncio.run(work), None)
        if figures.failed:
            raise InputError(f"{figures.failed} requests failed: {'; '.join(figures.errors)}")
        return figures

    def _offline(self, requests: Sequence[Request]) -> float:
        start, tokens = time.perf_counter(), 0
        for begin in range(0, len(requests), self._plan.rows):
            batch = requests[begin : begin + self._plan.rows]
            generations = self._runtime.generate(
                prompts_of(batch),
                max_new_tokens=[request.max_tokens for request in batch],
                sampling=Sampling(ignore_eos=True),
                mode=mode_of(batch[0]),
            )
            tokens += sum(len(generation.token_ids) for generation in generations)
        return tokens / (time.perf_counter() - start)

    def _mixed(self, prompt_tokens: tuple[int, int], new_tokens: tuple[int, int]) -> list[Request]:
        """Return random requests whose clusters alternate, in mode centroid if the bundle has it."""
        plan, manifest = self._plan, self._runtime.manifest
        mode = "centroid" if manifest.adaptation.regime == "chameleon" else None
        found = random_requests(
            plan.seed, CANDIDATES * plan.requests, prompt_tokens, new_tokens, manifest.model.vocab_size, [mode]
        )
        _, cluster_ids = self._runtime.embed(self._runtime.encode(prompts_of(found)))
        of_cluster: dict[int, list[Request]] = {}
        for request, cluster in zip(found, cluster_ids.tolist(), strict=True):
            of_cluster.setdefault(cluster, []).append(request)
        turns = itertools.zip_longest(*of_cluster.values())
        return [request for turn in turns for request in turn if request is not None][: plan.requests]


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


def _p99(figures: Figures) -> float:
    assert figures.first_token is not None  # noqa: S101  (no request failed)
    return figures.first_token.p99
