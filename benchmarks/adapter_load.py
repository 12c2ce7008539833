"""Adapters under load: many, replaced while they are used, each answer checked against PEFT afterwards.

    python -m chameleon_deploy.export BASE --adaptable all --max-rank 16 --out BUNDLE
    python -m benchmarks.adapter_load BUNDLE --reference BASE --adapters 64 --clients 16 --minutes 30 --threads 2

Clients choose adapters by Zipf's law. Meanwhile adapters are replaced in place by another version, or unloaded and
loaded again. Shorter slices in which nobody names an adapter take turns with these, for comparison. An answer
tells by its fingerprint which file computed it; PEFT reads it with that version, alone, and each of its tokens must be
as good as PEFT's own choice.
"""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import numpy as np
import torch
import typer

import chameleon_deploy
from benchmarks.served import SECONDS, serving
from chameleon_deploy.bench.timing import median_seconds
from chameleon_deploy.bench.workloads import BOUNDS
from chameleon_deploy.contract.adapter_file import write_adapter
from chameleon_deploy.contract.manifest import AdaptationSpec, factor_names
from chameleon_deploy.contract.peft_lora import write_peft
from chameleon_deploy.errors import CheckFailedError, InputError
from chameleon_deploy.reference.model import load_trunk
from chameleon_deploy.runtime import Adapt, Runtime
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.factor_sources import FactorSource
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

VERSIONS = 2  # of each adapter
PROMPTS = 32  # different ones
SLICES = 4  # of the time with adapters, and as many without
WITHOUT = 1 / 3  # of a slice with adapters: the length of one without
PROBES = 64  # answers that are read with another version, too, where the check must find them wrong
READING = 5  # copies: a PEFT directory's bytes and factors, and of adapters that requests read again, some at a time
SLACK = 64 * 2**20  # bytes that the server's memory may grow for other reasons
SPREAD = 0.05  # of the random factors, times the size of PEFT's own initialisation


@dataclass(frozen=True)
class Answer:
    """An answer, or none where the request was lost. digest: the beginning of the adapter file's; "" for the base"""

    prompt: int
    digest: str
    token_ids: tuple[int, ...]
    first_token: float


@dataclass
class Load:
    """A server under load.

    files  the PEFT directory of each digest's beginning; "" is the base
    away   when each adapter was unloaded, and when it was loaded again
    lost   requests that should have been answered, and were not
    """

    url: str
    prompts: list[list[int]]
    adapters: int
    max_tokens: int
    files: dict[str, str] = field(default_factory=dict)
    load_seconds: list[float] = field(default_factory=list)
    away: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def place(self, http: httpx.Client, name: str, version: int, **fields: Any) -> None:
        """Load a version of an adapter. Raises CheckFailedError where that is refused."""
        directory, start = f"{name}.{version}", time.perf_counter()
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": directory, **fields})
        if answer.status_code != 200:
            raise CheckFailedError(f"{directory} was not loaded: {answer.text}")
        self.load_seconds.append(time.perf_counter() - start)
        self.files[answer.json()["adapter"]["digest"][:16]] = directory

    def change(self, http: httpx.Client, chance: random.Random) -> None:
        """Replace an adapter by its other version, or unload one and load it again."""
        name, version = f"a{chance.randrange(self.adapters)}", chance.randrange(VERSIONS)
        if chance.random() < 0.8:
            self.place(http, name, version, load_inplace=True)
        else:
            periods, start = self.away.setdefault(name, []), time.perf_counter()
            periods.append((start, math.inf))
            http.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
            self.place(http, name, version)
            periods[-1] = start, time.perf_counter()

    def ask(self, http: httpx.Client, chance: random.Random, uses_adapters: bool) -> Answer | None:
        """Ask for one answer. None for an adapter that is unloaded just now, and for a lost one, which is noted."""
        prompt, name = chance.randrange(len(self.prompts)), None
        if uses_adapters:
            (number,) = chance.choices(range(self.adapters), [1 / (rank + 1) for rank in range(self.adapters)])
            name = f"a{number}"
        start = time.perf_counter()
        try:
            answer, fault = self._answer(http, prompt, name)
        except httpx.HTTPError as error:
            answer, fault = None, repr(error)
        if answer is None and not ("no adapter is named" in fault and self.was_away(name, start)):
            self.lost.append(f"{name}: {fault}")
        return answer

    def was_away(self, name: str | None, since: float) -> bool:
        """Return whether an adapter was unloaded at some time since then."""
        return any(end >= since for _, end in self.away.get(name or "", ()))

    def _answer(self, http: httpx.Client, prompt: int, name: str | None) -> tuple[Answer | None, str]:
        """Return an answer, or what is wrong with it."""
        body = {
            "prompt": self.prompts[prompt], "max_tokens": self.max_tokens, "temperature": 0, "adapters": [name],
            "stream": True, "return_token_ids": True, "ignore_eos": True,
        }  # fmt: skip
        start, first, ids, fingerprint, done = time.perf_counter(), 0.0, list[int](), "", False
        with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return None, answer.read().decode()
            for line in answer.iter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event: Any = msgspec.json.decode(line.removeprefix("data: "))
                for choice in event.get("choices", ()):
                    first = first or time.perf_counter() - start
                    ids += choice["token_ids"]
                    fingerprint = event["system_fingerprint"]
        if not done or len(ids) != self.max_tokens:
            return None, f"{len(ids)} tokens of {self.max_tokens}"
        return Answer(prompt, fingerprint.rpartition("-")[2] if name else "", tuple(ids), first), ""

    def run(self, seconds: float, clients: int, seed: int, uses_adapters: bool) -> list[Answer]:
        """Ask for so long, so many clients at once, while adapters come and go where they are used."""
        end = time.monotonic() + seconds

        def client(number: int) -> Iterator[Answer]:
            chance = random.Random(seed * 1000 + number)
            with httpx.Client(base_url=self.url, timeout=SECONDS) as http:
                while time.monotonic() < end:
                    if answer := self.ask(http, chance, uses_adapters):
                        yield answer

        def changes() -> None:
            chance = random.Random(seed)
            with httpx.Client(base_url=self.url, timeout=SECONDS) as http:
                while time.monotonic() < end:
                    self.change(http, chance)
                    time.sleep(0.2)

        with ThreadPoolExecutor(clients + 1) as pool:
            changing = pool.submit(changes) if uses_adapters else None
            found = list(pool.map(lambda number: list(client(number)), range(clients)))
            if changing is not None:
                changing.result()
        return [answer for answers in found for answer in answers]


def random_factors(spec: AdaptationSpec, rank: int, seed: int | list[int]) -> dict[str, Any]:
    """Return an update of every layer that can be adapted: <target>.lora_A and .lora_B, float32 [rank, width]."""
    random_, factors = np.random.default_rng(seed), dict[str, Any]()
    for target in spec.targets:
        for name, width in zip(factor_names(target.name), (target.in_features, target.out_features), strict=True):
            factors[name] = random_.normal(0, (SPREAD / width) ** 0.5, (rank, width)).astype(np.float32)
    return factors


def write_versions(out: Path, spec: AdaptationSpec, adapters: int, rank: int) -> None:
    """Write PEFT directories a0.0, a0.1, a1.0, ... of random factors for every layer that can be adapted."""
    for number in range(adapters):
        for version in range(VERSIONS):
            write_peft(out / f"a{number}.{version}", random_factors(spec, rank, [number, version]))


def seconds_to_place(runtime: Runtime, path: Path) -> float:
    """Return the median seconds in which an adapter is read, checked and placed where the decoder reads it.

    path  a PEFT directory, or an adapter file; another adapter is in place already
    """
    table = FactorTable(8)

    def place(name: str) -> FactorSource:
        runtime.load_adapter(name, path)
        adapt = runtime.sources.resolve(Adapt(adapters=[name]), 1)
        (source,) = runtime.sources.of_rows(adapt, [[0]], *runtime.sources.embed([[0]])).sources
        table.acquire(source)
        return source

    def place_and_remove() -> None:
        table.release(place("placed").key)
        runtime.unload_adapter("placed")

    place("first")
    seconds = median_seconds(place_and_remove)
    runtime.unload_adapter("first")
    return seconds


def with_other_versions(load: Load) -> Load:
    """Return the load as if every adapter had answered with its other version."""
    found = {digest: name.rpartition(".") for digest, name in load.files.items()}
    return replace(load, files={digest: f"{name}.{1 - int(of)}" for digest, (name, _, of) in found.items()})


@torch.no_grad()
def wrong_answers(
    reference: Path, files: Path, load: Load, answers: Sequence[Answer], precision: str
) -> tuple[int, list[str]]:
    """Read every different answer with PEFT.  -> how many there are, and what is wrong with those that are"""
    import peft

    model: Any = load_trunk(reference).causal_lm
    different = Counter((answer.digest, answer.prompt, answer.token_ids) for answer in answers)
    by_digest: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for digest, prompt, ids in different:
        by_digest.setdefault(digest, []).append((prompt, ids))
    wrong = []
    for digest, asked in by_digest.items():
        if digest and digest not in load.files:
            wrong.append(f"an answer of a file that was never loaded: {digest}")
            continue
        adapted = peft.PeftModel.from_pretrained(model, files / load.files[digest]).eval() if digest else model
        for prompt, ids in asked:
            text = torch.tensor([[*load.prompts[prompt], *ids[:-1]]])
            logits = adapted(input_ids=text).logits[0, -len(ids) :]
            regret = float((logits.max(-1).values - logits[range(len(ids)), list(ids)]).max())
            if not regret <= 2 * BOUNDS[precision]:  # two logits, each with its own deviation
                wrong.append(f"{load.files.get(digest, 'base')}, prompt {prompt}: {regret:.3g} below PEFT's choice")
        if digest:
            model = adapted.unload()
    return len(different), wrong


def resident(process: int, field_: str = "VmRSS") -> float:
    """Return the resident memory of a process in bytes."""
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    return 1024 * float(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field_}:")))


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, exported with --adaptable.")],
    reference: Annotated[Path, typer.Option(help="The base model that it was exported from.")],
    adapters: Annotated[int, typer.Option(min=1, help="Adapters, each in two versions.")] = 64,
    rank: Annotated[int, typer.Option(min=1, help="Of each adapter, on all layers that can be adapted.")] = 16,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    minutes: Annotated[float, typer.Option(min=0.01, help="With adapters, and a third as many without.")] = 30,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the server.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the server.")] = 2,
    max_adapter_bytes: Annotated[int, typer.Option(min=1, help="Of factors that the server keeps.")] = 2**30,
) -> None:
    """Load a server with adapters that come and go. Exit 1 for a wrong answer, a lost request or too much memory."""
    runtime = chameleon_deploy.load(bundle, threads=threads)
    spec, model, precision = runtime.manifest.adaptation, runtime.manifest.model, runtime.manifest.precision
    if not spec.base_digest:
        raise InputError(f"{bundle} takes no adapters: export its base model, with --adaptable LAYERS")
    chance = np.random.default_rng(0)
    width = min(prompt_tokens, model.max_positions - tokens)
    prompts = chance.integers(1, model.vocab_size, (PROMPTS, width)).tolist()
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        files, log = Path(place) / "files", Path(place) / "log"
        files.mkdir()
        write_versions(files, spec, adapters, rank)
        write_adapter(file := Path(place) / "a0.safetensors", random_factors(spec, rank, [0, 0]), spec)
        placing, placing_peft = seconds_to_place(runtime, file), seconds_to_place(runtime, files / "a0.0")
        del runtime
        options = ["--adapters", str(files), "--max-adapter-bytes", str(max_adapter_bytes), "--prefix-cache-bytes", "0"]
        url, process = stack.enter_context(serving(bundle, log, threads, rows, width + tokens, options))
        load = Load(url, prompts, adapters, tokens)
        seconds, answers = 60 * minutes / SLICES, {True: list[Answer](), False: list[Answer]()}
        answers[False] += load.run(seconds * WITHOUT, clients, 0, uses_adapters=False)
        before = resident(process)
        with httpx.Client(base_url=url, timeout=SECONDS) as http:
            for number in range(adapters):
                load.place(http, f"a{number}", 0)
        for number in range(1, 2 * SLICES):
            uses = number % 2 == 1
            answers[uses] += load.run(seconds if uses else seconds * WITHOUT, clients, number, uses_adapters=uses)
        grown = resident(process, "VmHWM") - before
        stack.pop_all().close()
        # What stays, the sets that requests hold, the stack of those in the batch, and one that is being read.
        bound = max_adapter_bytes + (clients + rows + READING) * 4 * rank * sum(spec.factor_widths.values()) + SLACK
        count, wrong = wrong_answers(reference, files, load, [*answers[False], *answers[True]], precision)
        probes = answers[True][:PROBES]
        read, seen = wrong_answers(reference, files, with_other_versions(load), probes, precision)
    lines = []
    for name, found in (("the base", answers[False]), (f"{adapters} adapters", answers[True])):
        times = [answer.first_token for answer in found]
        parts = (f"{1e3 * float(np.percentile(times, part)):.0f}" for part in (50, 99))
        lines.append([name, f"{len(found)}", *parts])
    caption = (
        f"{clients} clients, {precision}, {width} + {tokens} tokens; {len(load.load_seconds)} loads and replacements, "
        f"median {1e3 * float(np.median(load.load_seconds)):.0f} ms over HTTP; reading and placing one "
        f"of rank {rank} on {len(spec.targets)} layers takes {1e3 * placing:.1f} ms as a file and "
        f"{1e3 * placing_peft:.1f} as a PEFT directory; memory grew by "
        f"{grown / 2**20:.0f} MiB of {bound / 2**20:.0f}; {count} different answers read with PEFT, "
        f"{len(wrong)} wrong, {len(load.lost)} lost; of {read} read with the other version of their adapter "
        f"{len(seen)} are seen to be wrong; " + ", ".join(describe_machine().values())
    )
    console.show(Sheet(["", "answers", "first token, median, ms", "p99, ms"], lines, "Adapters under load", caption))
    faults = [*wrong, *load.lost, *(["memory"] if grown > bound else [])]
    if not seen:
        faults.append("the versions of an adapter cannot be told by their answers")
    if faults:
        raise CheckFailedError("; ".join(faults[:5]))


if __name__ == "__main__":
    console.run(main)
