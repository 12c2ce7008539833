"""Time the engine's prefix cache: first tokens, copies, look-ups, and what it costs where nothing is found.

    python -m benchmarks.prefix_cache BUNDLE --rounds 5

Requests with and without what is compared alternate; each figure is the median of the rounds. A bundle that takes
adapters is timed with 8 activated ones behind one prefix, too, beside 8 that update it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import chameleon_deploy
from benchmarks.adapter_load import random_factors
from chameleon_deploy import Engine, Generate, Runtime, Sampling, Stream
from chameleon_deploy.contract.adapter_file import max_rank, write_adapter
from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.runtime.decode.prefix_cache import BLOCK_TOKENS, PrefixCache
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.terminal import console

PREFIX_TOKENS = 1024
NEW_PROMPT_TOKENS = 16  # after the prefix
ANSWER_TOKENS = 48  # before the second turn
ADAPTERS, RANK = 8, 16  # asked at once behind one prefix
INVOCATION = (1, 2, 3, 4)
CACHE_BYTES = 2**30
SMALL_CACHE_BYTES = 2**26  # which a few rounds fill
LOOKED_UP_BLOCKS = 10_000
GREEDY = Sampling(ignore_eos=True)


class Prompts:
    """Random token ids, different each time."""

    def __init__(self, vocab_size: int) -> None:
        self._random, self._vocab_size = np.random.default_rng(0), vocab_size

    def __call__(self, length: int) -> list[int]:
        found: list[int] = self._random.integers(1, self._vocab_size, length).tolist()
        return found


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, int]:
    """Return the seconds from submit to the first token, and the cached tokens."""
    start = time.perf_counter()
    stream = engine.submit([prompt], Generate(1, GREEDY), mode="none")
    next(stream)
    return time.perf_counter() - start, stream.cached_tokens[0]


def time_first_tokens(runtime: Runtime, prompts: Prompts, rounds: int) -> None:
    cold, hit, new, second, copied, read = (list[float]() for _ in range(6))
    with Engine(runtime, rows=1, prefix_cache_bytes=CACHE_BYTES) as engine:
        for _ in range(rounds):
            prefix = prompts(PREFIX_TOKENS)
            for times, expected in ((cold, 0), (hit, PREFIX_TOKENS)):
                seconds, cached = first_token(engine, [*prefix, *prompts(NEW_PROMPT_TOKENS)])
                times.append(seconds)
                if cached != expected:
                    raise RuntimeError(f"{cached} tokens were cached, not {expected}")
            new.append(first_token(engine, prompts(NEW_PROMPT_TOKENS))[0])
            turn = [*prefix, *prompts(NEW_PROMPT_TOKENS)]
            answer = engine.submit([turn], Generate(ANSWER_TOKENS, GREEDY), mode="none").result()[0].token_ids
            with timed() as spent:
                second.append(first_token(engine, [*turn, *answer, *prompts(NEW_PROMPT_TOKENS)])[0])
            copied.append(spent["copy_in"])
            read.append(spent["prefill"] + spent["step"])
    at = statistics.median(cold)
    print(f"first token of {PREFIX_TOKENS} + {NEW_PROMPT_TOKENS} tokens, cold  {at * 1000:8.1f} ms")
    others = {
        "with a cached prefix": hit, f"of the {NEW_PROMPT_TOKENS} alone": new, "of the second turn": second,
        "of that, copy of its blocks into the row": copied, "of that, reading its other tokens": read,
    }  # fmt: skip
    for name, times in others.items():
        seconds = statistics.median(times)
        print(f"{name:38s} {seconds * 1000:8.1f} ms  {seconds / at:.1%}")
    ratios = [(whole - tokens) / copy for whole, tokens, copy in zip(second, read, copied, strict=True)]
    print(f"the second turn without reading these takes {statistics.median(ratios):.2f} times the copy")


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Give the seconds that engines spend in some methods of their slots, by name."""
    seconds = defaultdict[str, float](float)
    methods = {name: getattr(Slots, name) for name in ("copy_in", "prefill", "step")}

    def with_clock(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = methods[name](*arguments)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    for name in methods:
        setattr(Slots, name, with_clock(name))
    try:
        yield seconds
    finally:
        for name, method in methods.items():
            setattr(Slots, name, method)


def time_adapters(runtime: Runtime, prompts: Prompts, rounds: int, directory: Path) -> None:
    """Time the first tokens of one request for each adapter, all asked at once behind a prefix that the base has read.

    "activated" adapters update only what follows their invocation tokens, "plain" ones the prefix too.
    """
    spec = runtime.manifest.adaptation
    names = {kind: [f"{kind}{number}" for number in range(ADAPTERS)] for kind in ("plain", "activated")}
    for number, name in enumerate([name for kind in names.values() for name in kind]):
        file = directory / f"{name}.safetensors"
        factors = random_factors(spec, min(RANK, max_rank(spec)), number)
        write_adapter(file, factors, spec, INVOCATION if name in names["activated"] else ())
        runtime.load_adapter(name, file)
    seconds = {kind: list[float]() for kind in names}
    with Engine(runtime, rows=ADAPTERS, prefix_cache_bytes=CACHE_BYTES) as engine:
        for number in range(rounds + 1):
            prefix = prompts(PREFIX_TOKENS)
            engine.submit([[*prefix, *prompts(NEW_PROMPT_TOKENS)]], Generate(1, GREEDY)).result()
            for kind in sorted(names, reverse=number % 2 == 0):
                texts = [[*prefix, *prompts(NEW_PROMPT_TOKENS), *INVOCATION] for _ in names[kind]]
                found = first_tokens(engine, texts, names[kind])
                seconds[kind] += [statistics.fmean(found)] if number else []  # the first round warms up
    plain, activated = (statistics.median(seconds[kind]) for kind in names)
    ratios = [plain / activated for plain, activated in zip(seconds["plain"], seconds["activated"], strict=True)]
    print(
        f"first tokens of {ADAPTERS} adapters behind one prefix, plain {plain * 1000:8.1f} ms, activated "
        f"{activated * 1000:8.1f} ms: {statistics.median(ratios):.1f} times as soon "
        f"(from {min(ratios):.1f} to {max(ratios):.1f})"
    )


def first_tokens(engine: Engine, texts: list[list[int]], adapters: list[str]) -> list[float]:
    """Return the seconds from the first submit to each request's first token."""
    start = time.perf_counter()
    streams = [
        engine.submit([text], Generate(1, GREEDY), adapters=[name])
        for text, name in zip(texts, adapters, strict=True)
    ]  # fmt: skip

    def wait(stream: Stream) -> float:
        next(stream)
        return time.perf_counter() - start

    with ThreadPoolExecutor(len(streams)) as pool:
        return list(pool.map(wait, streams))


def decoder_of(runtime: Runtime) -> SharedCacheDecoder:
    decoder = runtime.decoder
    assert isinstance(decoder, SharedCacheDecoder)  # noqa: S101  (of provider cpu)
    return decoder


def opened(runtime: Runtime, blocks: int) -> PrefixCache:
    decoder = decoder_of(runtime)
    return decoder.prefix_cache(runtime.bundle.digest, blocks * BLOCK_TOKENS * decoder.token_bytes)


def time_lookups(runtime: Runtime, prompts: Prompts) -> None:
    cache, texts = opened(runtime, LOOKED_UP_BLOCKS), []
    root = cache.root(b"", "")
    for _ in range(LOOKED_UP_BLOCKS * BLOCK_TOKENS // PREFIX_TOKENS):
        texts.append(prompts(PREFIX_TOKENS))
        cache.offer(root, texts[-1], 0, lambda start, block: None)
    times = []
    for text in texts:
        start = time.perf_counter()
        found = cache.find(cache.root(b"", ""), text)
        times.append(time.perf_counter() - start)
        if len(found) != PREFIX_TOKENS // BLOCK_TOKENS:
            raise RuntimeError("a text was not found")
    blocks = cache.stats().tokens // BLOCK_TOKENS
    print(f"look-up of {PREFIX_TOKENS} tokens at {blocks:,} blocks  {statistics.median(times) * 1000:8.3f} ms")


def time_misses(runtime: Runtime, prompts: Prompts, pairs: int, prompt_tokens: int, new_tokens: int) -> None:
    """Time rows that find nothing, with a cache that is full and without one, by the clock and by the processor's time.

    The first write to new memory takes several times as long as the copy of a block, once in the life of a server.
    """
    ratios = np.empty((2, pairs))  # by the clock and by the processor

    def spent(engine: Engine) -> FloatArray:
        requests = [prompts(prompt_tokens) for _ in range(engine.rows)]
        start = np.array([time.perf_counter(), time.process_time()])
        streams = [engine.submit([ids], Generate(new_tokens, GREEDY), mode="none") for ids in requests]
        for stream in streams:
            stream.result()
        taken: FloatArray = np.array([time.perf_counter(), time.process_time()]) - start
        return taken

    with (
        Engine(runtime, prefix_cache_bytes=SMALL_CACHE_BYTES) as cached,
        Engine(runtime, prefix_cache_bytes=0) as plain,
    ):
        while not cached.prefix_cache_stats().evictions:
            spent(cached)
        spent(plain)
        for number in range(pairs):
            times = {engine: spent(engine) for engine in ((cached, plain) if number % 2 else (plain, cached))}
            ratios[:, number] = times[plain] / times[cached]
        hits = cached.prefix_cache_stats().hits
    print(
        f"throughput without hits, {prompt_tokens} + {new_tokens} tokens, {cached.rows} rows, of that without the "
        f"cache: {of_pairs(ratios[0])}, by the processor's time {of_pairs(ratios[1])}; {pairs} pairs, {hits} hits"
    )


def of_pairs(ratios: FloatArray) -> str:
    """Return a median and its 95 % interval, by resampling."""
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    pairs: Annotated[int, typer.Option(min=1, help="Samples of the throughput without hits.")] = 20,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of prompts that find nothing.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of their answers.")] = 16,
) -> None:
    """Time the prefix cache of an engine."""
    runtime = chameleon_deploy.load(bundle, threads=threads, mode="none")
    prompts = Prompts(runtime.manifest.model.vocab_size)
    time_lookups(runtime, prompts)
    time_misses(runtime, prompts, pairs, prompt_tokens, new_tokens)
    if runtime.manifest.model.max_positions >= PREFIX_TOKENS + 4 * NEW_PROMPT_TOKENS + ANSWER_TOKENS:
        time_first_tokens(runtime, prompts, rounds)
        if runtime.manifest.adaptation.base_digest and runtime.manifest.adaptation.targets:
            with tempfile.TemporaryDirectory() as directory:
                time_adapters(chameleon_deploy.load(bundle, threads=threads), prompts, rounds, Path(directory))


if __name__ == "__main__":
    console.run(main)
