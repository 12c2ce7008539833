"""A soak: `python -m tests.runtime.soak BUNDLE [--threads 64] [--requests 1000000] [--evicting]`.

Tiny requests of many threads, whose answers must be those of serial requests, without memory that grows or anything
left over. With --evicting their prompts begin alike, and the prefix cache has no room for all beginnings. Prints one
line of JSON. The exit code is 1 where something is not so, which standard error says.
runtime/tests/soak.cpp is the same for C++, without --evicting.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chameleon_deploy import Engine, Generation, Runtime, Sampling, load
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime.decode.prefix_cache import BLOCK_TOKENS
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder

# Answers a request, which its number says.
Service = Callable[[int], list[str]]
# Starts a service, which gives back all that it took when it is left.
Opening = Callable[[], AbstractContextManager[Service]]

PARTS = 10
MAX_DRIFT = 0.02
DISTINCT = 1000
BEGINNINGS, CACHED = 7, 4  # of prompts: different ones, and those that an evicting prefix cache has room for
MODES: tuple[Mode, ...] = ("none", "centroid", "request", "cohort", "tenant")


@dataclass(frozen=True)
class Holdings:
    """What this process holds, without memory that an allocator keeps for later."""

    threads: int
    files: int
    resident_mib: float


@dataclass(frozen=True)
class Report:
    """What a soak found.

    wrong         answers that differ from the serial ones
    resident_mib  after each tenth of the requests, without pages of files
    drift         growth of the resident memory over the second half of the requests: 0.01 is 1 %
    before        before the service was opened
    after         after it was closed
    """

    requests: int
    wrong: int
    ms_per_request: float
    resident_mib: list[float]
    drift: float
    before: Holdings
    after: Holdings

    def faults(self) -> Iterator[str]:
        """Yield a sentence for everything that was promised and is not so."""
        before, after = self.before, self.after
        if self.wrong:
            yield f"{self.wrong} answers differ from the serial ones"
        if self.drift >= MAX_DRIFT:
            yield f"resident memory grows by {self.drift:.2%} over the second half"
        if after.threads > before.threads:
            yield f"{after.threads} threads after close, {before.threads} before"
        if after.files > before.files:
            yield f"{after.files} open files after close, {before.files} before"
        if after.resident_mib >= (1 + MAX_DRIFT) * before.resident_mib:
            yield f"{after.resident_mib:.1f} MiB after close, {before.resident_mib:.1f} before"


def soak(opening: Opening, serial: Sequence[list[str]], threads: int, requests: int) -> Report:
    """Send requests from many threads, which go round the serial answers.

    A first service answers each request once before anything is measured, since libraries keep what they make for
    their first use.
    """
    wrong_answers(opening, serial, threads, len(serial))
    before, start = holdings(), time.perf_counter()
    wrong, resident = wrong_answers(opening, serial, threads, requests)
    seconds, after = time.perf_counter() - start, holdings()
    drift = resident[-1] / resident[PARTS // 2 - 1] - 1
    return Report(requests, wrong, 1000 * seconds / requests, resident, drift, before, after)


def wrong_answers(
    opening: Opening, serial: Sequence[list[str]], threads: int, requests: int
) -> tuple[int, list[float]]:
    """Send the requests.  -> the number of wrong answers, and resident MiB after each tenth"""
    numbers, answered, resident = itertools.count(), itertools.count(1), list[float]()

    def work(service: Service) -> int:
        wrong = 0
        while (number := next(numbers)) < requests:
            wrong += service(number % len(serial)) != serial[number % len(serial)]
            done = next(answered)
            if done * PARTS // requests > (done - 1) * PARTS // requests:
                resident.append(resident_mib())
        return wrong

    with opening() as service, ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, [service] * threads)), resident


def holdings() -> Holdings:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    threads, files = (len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd"))
    return Holdings(threads, files, resident_mib())


def resident_mib(process_id: int | str = "self") -> float:
    """Return the resident memory of a process without the pages of files, which the kernel takes back as it likes.

    /proc/PID/status has it too, but lags behind by up to 64 pages for each thread.
    """
    found = re.search(r"^Anonymous:\s+(\d+)", Path(f"/proc/{process_id}/smaps_rollup").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/{process_id}/smaps_rollup has no Anonymous")
    return int(found[1]) / 1024


def tiny_request(number: int, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `generate` and `submit`."""
    return {
        "prompts": [
            [1 + (31 * number + 17 * row + i * (5 + number % 11)) % (vocab_size - 1) for i in range(1 + number % 7)]
            for row in range(2 if number % 10 == 9 else 1)
        ],
        "mode": MODES[number % 5],
        "max_new_tokens": 1 + number % 3,
        "sampling": Sampling(temperature=number % 2, seed=number),
    }


def texts(generations: list[Generation]) -> list[str]:
    return [generation.text for generation in generations]


def generate(runtime: Runtime, prompts: list[list[int]], mode: Mode, **how: Any) -> list[str]:
    tenants = ["a"] * len(prompts) if mode == "tenant" else None
    return texts(runtime.generate(prompts, mode=mode, tenants=tenants, **how))


def submit(engine: Engine, prompts: list[list[int]], mode: Mode, **how: Any) -> list[str]:
    tenants = ["a"] * len(prompts) if mode == "tenant" else None
    return texts(engine.submit(prompts, mode=mode, tenants=tenants, **how).result())


def serial_answers(bundle: Path, count: int) -> list[list[str]]:
    """What `generate` answers to the first requests, one at a time."""
    runtime = load(bundle, threads=1)
    vocab_size = runtime.manifest.model.vocab_size
    return [generate(runtime, **tiny_request(number, vocab_size)) for number in range(count)]


@contextmanager
def engine_service(bundle: Path, count: int) -> Iterator[Service]:
    """Of four of the first requests three go to an engine and one to `generate` of its runtime."""
    runtime = load(bundle, threads=1)
    requests = [tiny_request(number, runtime.manifest.model.vocab_size) for number in range(count)]
    with Engine(runtime) as engine:
        yield (
            lambda number: (
                generate(runtime, **requests[number]) if number % 4 == 3 else submit(engine, **requests[number])
            )
        )


def beginning_request(number: int, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `submit` for a prompt that begins as many others do.

    Beginnings go up and down, since a cache of the least recently used finds nothing of more that go round than it has
    room for.
    """
    kind = abs(number % (2 * BEGINNINGS - 2) - (BEGINNINGS - 1))
    beginning = [1 + (37 * kind + 11 * i) % (vocab_size - 1) for i in range(2 * BLOCK_TOKENS)]
    rest = [1 + (31 * number + i * (5 + number % 11)) % (vocab_size - 1) for i in range(1 + number % 9)]
    how = {"mode": "none", "max_new_tokens": 1 + number % 3, "sampling": Sampling(seed=number)}
    return {"prompts": [[*beginning, *rest]], "cache_generated": False, **how}


@contextmanager
def evicting_service(bundle: Path, count: int, blocks: int = 2 * CACHED) -> Iterator[Service]:
    """An engine whose prefix cache holds so many blocks."""
    runtime = load(bundle, threads=1)
    requests = [beginning_request(number, runtime.manifest.model.vocab_size) for number in range(count)]
    assert isinstance(runtime.decoder, SharedCacheDecoder)
    room = blocks * BLOCK_TOKENS * runtime.decoder.token_bytes
    with Engine(runtime, prefill_tokens=BLOCK_TOKENS, prefix_cache_bytes=room) as engine:
        yield lambda number: submit(engine, **requests[number])
        stats = engine.prefix_cache_stats()
    if blocks and not (stats.hits and stats.evictions):
        raise RuntimeError(f"nothing was found or evicted: {stats}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--evicting", action="store_true")
    arguments = parser.parse_args()
    if arguments.evicting:
        with evicting_service(arguments.bundle, DISTINCT, blocks=0) as cold:
            serial = [cold(number) for number in range(DISTINCT)]
    else:
        serial = serial_answers(arguments.bundle, DISTINCT)
    opening = partial(evicting_service if arguments.evicting else engine_service, arguments.bundle, DISTINCT)
    report = soak(opening, serial, arguments.threads, arguments.requests)
    faults = list(report.faults())
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print(json.dumps(dataclasses.asdict(report)))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
