"""One run of the benchmark: the footprint, then all timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from chameleon_deploy.bench.footprint import Footprint, measure_footprint
from chameleon_deploy.bench.timing import MAX_EXTRA_ROUNDS, Timing, measure
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import InputError
from chameleon_deploy.terminal.progress import Progress

if TYPE_CHECKING:
    from chameleon_deploy.bench.quality import Quality
    from chameleon_deploy.reference.checkpoint import Checkpoint


class CaseName(StrEnum):
    """What is timed."""

    SCORING = "scoring"
    FIRST_TOKEN = "first-token"  # noqa: S105  (of a text)
    GENERATION = "generation"


@dataclass(frozen=True)
class Benchmark:
    """The results of one run.

    machine        the processor and the versions of all engines
    weights_bytes  of the bundle
    quality        by engine; empty without windows
    missing        engines that could not be opened here, and why
    """

    machine: dict[str, str]
    precision: str
    threads: int
    weights_bytes: int
    footprint: Footprint
    timings: list[Timing]
    quality: dict[str, Quality]
    missing: dict[str, str]

    @property
    def not_compared(self) -> dict[str, str]:
        """Return the engines that are missing or failed at something, and why."""
        failed = {
            f"{name}, {timing.part.name}": reason for timing in self.timings for name, reason in timing.failed.items()
        }
        return self.missing | failed


@dataclass(frozen=True)
class Plan:
    """What is measured.

    batch_sizes        of generation
    width, num_tokens  tokens of every prompt, and tokens to generate after it
    rounds             samples per engine, and `max_extra_rounds` more where they are noisy
    foreign            also compare with torch.compile, CTranslate2, OpenVINO and llama.cpp
    only               how the names of the engines begin that the bundle is compared with; none for all
    windows            token ids to measure the quality on
    cases              what is timed
    """

    threads: int
    batch_sizes: Sequence[int]
    width: int
    num_tokens: int
    rounds: int
    max_extra_rounds: int = MAX_EXTRA_ROUNDS
    foreign: bool = True
    only: Sequence[str] = ()
    windows: Sequence[Sequence[int]] = ()
    cases: Sequence[CaseName] = tuple(CaseName)


def run(bundle: Path, checkpoint: Checkpoint, plan: Plan, report: Progress) -> Benchmark:
    """Measure the footprint, the quality, then all timings."""
    import chameleon_deploy
    from chameleon_deploy.bench import workloads
    from chameleon_deploy.bench.peers import open_peers
    from chameleon_deploy.bench.quality import Quality, measure_quality
    from chameleon_deploy.runtime.machine import describe_machine

    positions = open_bundle(bundle).manifest.model.max_positions
    threads, num_tokens, rounds, windows = plan.threads, plan.num_tokens, plan.rounds, plan.windows
    width = min(plan.width, positions - num_tokens)
    if width < 2:
        raise InputError(
            f"no room for a prompt before {num_tokens} tokens in {positions} positions: pass fewer --tokens"
        )
    report("footprint", 0, 1)
    footprint = measure_footprint(bundle, threads, min(rounds, 3), 8, width, num_tokens)
    report("footprint", 1, 1)
    runtime = chameleon_deploy.load(bundle, threads=threads)
    rows = workloads.text_rows(checkpoint, max(8, *plan.batch_sizes), width)
    with TemporaryDirectory() as directory:
        report("convert for other engines", 0, 1)
        peers, missing = open_peers(runtime, checkpoint, threads, Path(directory), plan.foreign, plan.only)
        report("convert for other engines", 1, 1)
        read = measure_quality(peers, checkpoint.trunk, windows, report) if windows else {}
        work = workloads.Workloads(runtime, checkpoint, peers)
        cases = [work.scoring(rows[:8])] * (CaseName.SCORING in plan.cases)
        cases += [work.first_token(rows[0])] * (CaseName.FIRST_TOKEN in plan.cases)
        if CaseName.GENERATION in plan.cases:
            cases += [work.generation(rows[:batch], num_tokens) for batch in plan.batch_sizes]
        timings = [timing for case in cases for timing in measure(case, rounds, report, plan.max_extra_rounds)]
    return Benchmark(
        machine=describe_machine(runtime.integer_weights),
        precision=runtime.manifest.precision,
        threads=threads,
        weights_bytes=sum(spec.size for name, spec in runtime.manifest.files.items() if name.endswith(".bin")),
        footprint=footprint,
        timings=timings,
        quality={name: found for name, found in read.items() if isinstance(found, Quality)},
        missing=missing | {f"{name}, quality": why for name, why in read.items() if isinstance(why, str)},
    )
