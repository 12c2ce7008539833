"""How a cluster scales: the real routing, with replicas and an ingress that take time by a recorded model.

    python -m benchmarks.scaling                                    # GPT-2 small in fp32
    python -m benchmarks.scaling --record BUNDLE --threads 1        # measure the model of steps of a bundle first
    python -m benchmarks.scaling --replicas 16 --routing cluster --clusters 64
    python -m benchmarks.scaling --routing load --routing prefix --clusters 64 --prefix-tokens 512 --cached-prefixes 8

Time is simulated, so that 64 replicas fit one processor. Requests arrive as a Poisson process, of clusters that follow
Zipf's law. With --prefix-tokens the requests of a cluster begin alike, as those of one system prompt do, and a replica
reads that beginning unless its prefix cache has it. A replica iterates as the engine does: it admits while it has rows,
prefills one chunk, steps all rows. A token leaves through one of the ingresses, each a queue with a fixed time per
token. Two runs give each line: one at 80 % of what the replicas can do, for the time to the first token and the factor
sets, and prefixes that were found; the rest is of one that offers more.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
import time
from collections import OrderedDict, deque
from dataclasses import astuple, dataclass, field, replace
from enum import StrEnum
from typing import Annotated

import numpy as np
import typer
from scipy.optimize import nnls

import chameleon_deploy
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.runtime.engine.iteration import Iteration
from chameleon_deploy.serve.routing import choose
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

CHUNK = 128  # prompt tokens per iteration, as the server has it
PROMPT, NEW_TOKENS = (16, 128), (16, 128)  # uniform between these
ZIPF = 1.2
ROUNDS, NEW = 2, 32  # of a recording: repetitions, and tokens of each row


@dataclass(frozen=True)
class Costs:
    """Seconds: of a step, base + row * rows + factor_set * (sets - 1); of n prompt tokens, chunk + prompt_token * n; of
    a token's way out.

    By default what --record measured for GPT-2 small in fp32 with two threads (docs/lab/scaling.md), and what
    benchmarks/ingress_cost.py did for the way out.
    """

    base: float = 0.0185
    row: float = 0.00168
    factor_set: float = 0.0
    chunk: float = 0.0228
    prompt_token: float = 0.0005
    ingress_token: float = 0.00074

    def step(self, rows: int, sets: int) -> float:
        return self.base + self.row * rows + self.factor_set * (sets - 1)


@dataclass
class Request:
    due: float
    cluster: int
    prompt: int
    left: int
    begun: bool = False


@dataclass
class Prefixes:
    """What the prompts of a cluster begin with.

    tokens             0 for nothing
    cached             clusters whose beginning one replica keeps
    looked_for, found  how often, counted here
    """

    tokens: int = 0
    cached: int = 8
    looked_for: int = 0
    found: int = 0


@dataclass
class Replica:
    """An engine: requests that wait, one whose prompt is read, those that generate."""

    waiting: deque[Request] = field(default_factory=deque)
    reading: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    busy: bool = False
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)  # clusters, the most recently used last

    @property
    def queue(self) -> int:
        return len(self.waiting) + len(self.reading) + len(self.running)

    def iterate(self, costs: Costs, rows: int, prefixes: Prefixes) -> tuple[float, list[Request], int, int]:
        """Return the seconds, the requests that get a token, and rows and factor sets of the step."""
        while self.waiting and len(self.reading) + len(self.running) < rows:
            self.reading.append(self.waiting.popleft())
        seconds = 0.0
        if self.reading and not self.reading[0].begun:
            self._begin(self.reading[0], prefixes)
        if self.reading:
            read = min(CHUNK, self.reading[0].prompt)
            self.reading[0].prompt -= read
            seconds += costs.chunk + read * costs.prompt_token
            if not self.reading[0].prompt:
                self.running.append(self.reading.popleft())
        sets = len({request.cluster for request in self.running})
        if self.running:
            seconds += costs.step(len(self.running), sets)
        return seconds, list(self.running), len(self.running), sets

    def _begin(self, request: Request, prefixes: Prefixes) -> None:
        """Find the beginning of a prompt in the prefix cache, or read it too."""
        request.begun = True
        if not prefixes.tokens:
            return
        prefixes.looked_for += 1
        if request.cluster in self.cached:
            prefixes.found += 1
        else:
            request.prompt += prefixes.tokens
        self.cached[request.cluster] = None
        self.cached.move_to_end(request.cluster)
        if len(self.cached) > prefixes.cached:
            self.cached.popitem(last=False)


@dataclass
class Result:
    tokens_per_second: float
    first_token_p99: float
    sets_per_step: float
    longest_queue: int
    ingress_busy: float
    prefix_hits: float


@dataclass(frozen=True)
class Deployment:
    """Replicas and the processes before them.

    routing    "load", "cluster" or "prefix", whose key is the cluster, too
    clusters   of the requests
    rows       of a replica
    ingresses  processes that tokens leave through
    prefix_tokens, cached_prefixes  see Prefixes
    bound      of a replica's queue, see `routing.choose`
    """

    replicas: int
    routing: str
    clusters: int
    rows: int
    ingresses: int
    prefix_tokens: int = 0
    cached_prefixes: int = 8
    bound: float = 1.25


def simulate(deployment: Deployment, rate: float, seconds: float, costs: Costs) -> Result:
    """Run one deployment for so many simulated seconds; the first fifth is not counted.

    rate  requests per second
    """
    replicas, routing, clusters, rows, ingresses, *of_prefixes, bound = astuple(deployment)
    prefixes = Prefixes(*of_prefixes)
    random.seed(replicas)
    engines = {str(i): Replica() for i in range(replicas)}
    weights = [1 / (rank + 1) ** ZIPF for rank in range(clusters)]
    held, limit, warm = deque[Request](), 2 * rows, seconds / 5
    free_at, busy = [0.0] * ingresses, 0.0
    tokens = steps = step_sets = longest = 0
    first: list[float] = []
    started: set[int] = set()
    events: list[tuple[float, int, str, list[Request]]] = [(random.expovariate(rate), 0, "", [])]
    count = 0

    def start(name: str, now: float) -> None:
        nonlocal steps, step_sets, count
        engine = engines[name]
        took, got, stepped, sets = engine.iterate(costs, rows, prefixes)
        if stepped and now > warm:
            steps, step_sets = steps + 1, step_sets + sets
        engine.busy, count = True, count + 1
        heapq.heappush(events, (now + took, count, name, got))

    def route(request: Request, now: float) -> bool:
        nonlocal longest
        queues = {name: engine.queue for name, engine in engines.items()}
        for name in choose(queues, None if routing == "load" else str(request.cluster), bound):
            if queues[name] < limit:
                engines[name].waiting.append(request)
                longest = max(longest, queues[name] + 1)
                if not engines[name].busy:
                    start(name, now)
                return True
        return False

    while events:
        now, _, name, got = heapq.heappop(events)
        if now > seconds:
            break
        if not name:  # an arrival
            (cluster,) = random.choices(range(clusters), weights)
            request = Request(now, cluster, random.randint(*PROMPT), random.randint(*NEW_TOKENS))
            if not route(request, now) and len(held) < 256:
                held.append(request)
            count += 1
            heapq.heappush(events, (now + random.expovariate(rate), count, "", []))
            continue
        engine = engines[name]
        for request in got:
            i = min(range(ingresses), key=free_at.__getitem__)
            free_at[i] = max(free_at[i], now) + costs.ingress_token
            busy += costs.ingress_token
            if warm < free_at[i] <= seconds:
                tokens += 1
            if id(request) not in started:
                started.add(id(request))
                if request.due > warm:
                    first.append(free_at[i] - request.due)
            request.left -= 1
            if not request.left:
                engine.running.remove(request)
                started.discard(id(request))
        engine.busy = False
        while held and route(held[0], now):
            held.popleft()
        if engine.queue and not engine.busy:
            start(name, now)
    return Result(
        tokens / (seconds - warm),
        float(np.percentile(first, 99)) if first else float("nan"),
        step_sets / max(steps, 1),
        longest,
        min(1.0, busy / seconds / ingresses),
        prefixes.found / max(prefixes.looked_for, 1),
    )


def capacity(replicas: int, rows: int, costs: Costs, prefix_tokens: int = 0) -> float:
    """Requests per second that full replicas can do, by the model alone.

    prefix_tokens  that are read in every request, besides its own
    """
    prompt, new = statistics.mean(PROMPT) + prefix_tokens, statistics.mean(NEW_TOKENS)
    return replicas / (costs.chunk + prompt * costs.prompt_token + new * costs.step(rows, rows) / rows)


def record(bundle: str, threads: int, rows: int) -> Costs:
    """Fit the model to the engine's iterations on a bundle, 1 to `rows` greedy rows of one or several clusters.

    An iteration lasts until the next one ends, so it includes sampling and handing out.
    """
    runtime = chameleon_deploy.load(bundle, mode="centroid", threads=threads)
    longest = min(PROMPT[1], runtime.manifest.model.max_positions - NEW)
    texts = [text for kind in KINDS for text in python_texts(kind, 20)]
    random.seed(0)
    prompts = [runtime.tokenizer.encode(text).ids[: random.randint(PROMPT[0], longest)] for text in texts]
    of_cluster: dict[int, list[list[int]]] = {}
    for prompt, cluster_id in zip(prompts, runtime.embed(prompts)[1].tolist(), strict=True):
        of_cluster.setdefault(cluster_id, []).append(prompt)
    ends: list[tuple[float, Iteration]] = []
    lasted: dict[tuple[int, int, int], list[float]] = {}
    with chameleon_deploy.Engine(
        runtime, rows=rows, prefill_tokens=CHUNK, observe=lambda made: ends.append((time.perf_counter(), made)),
        prefix_cache_bytes=0,  # prompts come again
    ) as engine:  # fmt: skip
        for count, mixed, _ in itertools.product(range(1, rows + 1), (False, True), range(ROUNDS)):
            clusters = list(of_cluster.values())[: None if mixed else 1]
            ends.clear()
            chosen = [random.choice(clusters[i % len(clusters)]) for i in range(count)]
            streams = [engine.submit([prompt], max_new_tokens=NEW) for prompt in chosen]
            for stream in streams:
                stream.result()
            for (begin, _), (end, made) in itertools.pairwise(ends):
                lasted.setdefault((made.rows, made.factor_sets, made.prefilled_tokens), []).append(end - begin)
    kinds = np.array([(count > 0, count, max(sets - 1, 0), read > 0, read) for count, sets, read in lasted])
    seconds = np.array([statistics.median(times) for times in lasted.values()])
    weights = np.sqrt([len(times) for times in lasted.values()])
    fitted, _ = nnls(kinds * weights[:, None], seconds * weights)  # least squares, and no cost below 0
    return Costs(*map(float, fitted))


class Routing(StrEnum):
    """How requests find a replica."""

    LOAD = "load"
    CLUSTER = "cluster"
    PREFIX = "prefix"


def main(
    replicas: Annotated[list[int] | None, typer.Option(min=1, help="Sizes of the cluster; default: 1 to 64.")] = None,
    routing: Annotated[list[Routing] | None, typer.Option(help="Default: all.")] = None,
    clusters: Annotated[int, typer.Option(min=1, help="Clusters of the requests.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a replica.")] = 8,
    ingresses: Annotated[int, typer.Option(min=1, help="Processes that tokens leave through.")] = 1,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Tokens that all requests of a cluster begin with.")] = 0,
    cached_prefixes: Annotated[int, typer.Option(min=1, help="Of a replica's prefix cache.")] = 8,
    bound: Annotated[float, typer.Option(min=1, help="Of a replica's queue, in multiples of the mean.")] = 1.25,
    seconds: Annotated[float, typer.Option(min=1, help="Simulated seconds.")] = 60,
    bundle: Annotated[
        str | None, typer.Option("--record", metavar="BUNDLE", help="Measure the costs of this bundle first.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the measurement.")] = 1,
    ingress_token: Annotated[float, typer.Option(min=0, help="Seconds of a token's way out.")] = Costs.ingress_token,
) -> None:
    """Simulate clusters of several sizes: tokens per second, first tokens, factor sets and queues."""
    costs = replace(record(bundle, threads, rows) if bundle else Costs(), ingress_token=ingress_token)
    headers = ["routing", "replicas", "tokens/s", "of linear", "first token p99, s", "sets per step", "longest queue",
               "ingress busy", "prefix hits"]  # fmt: skip
    lines = []
    for way in routing or list(Routing):
        one = None
        for size in replicas or [1, 2, 4, 8, 16, 32, 64]:
            deployment = Deployment(size, way.value, clusters, rows, ingresses, prefix_tokens, cached_prefixes, bound)
            # More than without a prefix to read, and less than with all of them.
            full = simulate(deployment, 1.3 * capacity(size, rows, costs), seconds, costs)
            usual = simulate(deployment, 0.8 * capacity(size, rows, costs, prefix_tokens), seconds, costs)
            one = one or full.tokens_per_second / size
            lines.append([
                way.value, f"{size}", f"{full.tokens_per_second:,.0f}",
                f"{full.tokens_per_second / size / one:.1%}", f"{usual.first_token_p99:.2f}",
                f"{usual.sets_per_step:.2f}", f"{full.longest_queue}", f"{full.ingress_busy:.0%}",
                f"{usual.prefix_hits:.0%}" if prefix_tokens else "",
            ])  # fmt: skip
    limit = ingresses / costs.ingress_token if costs.ingress_token else float("inf")
    note = f"{ingresses} ingress(es), at most {limit:,.0f} tokens/s; {costs}"
    console.show(Sheet(headers, lines, "Scaling, simulated", note))


if __name__ == "__main__":
    console.run(main)
