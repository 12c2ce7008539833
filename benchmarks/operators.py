"""What a step of a bundle spends its time on, by operator: `python -m benchmarks.operators BUNDLE --batch 1`.

ONNX Runtime's profiler times every operator. It takes time itself, so shares and counts are what counts: how long a
step takes is what `bench` says.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

import chameleon_deploy
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.decode import session as opening
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

Operators = dict[str, tuple[float, float]]  # by name, in one step: how many, and their milliseconds
AROUND = "If"  # its time is that of the operators in its branches, which are counted themselves


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 1,
    past: Annotated[int, typer.Option(min=1, help="Tokens of every prompt.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are profiled.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
) -> None:
    """Profile steps and print the operators of one, by their time."""
    with TemporaryDirectory() as directory, profiled(Path(directory)):
        runtime = chameleon_deploy.load(bundle, threads=threads)
        found = operators_of(_profile(runtime, batch, past, steps), steps)
    rows = [[name, f"{count:.0f}", f"{time:.3f}"] for name, (count, time) in found.items()]
    calls, whole = (sum(values) for values in zip(*(v for name, v in found.items() if name != AROUND), strict=True))
    rows.append(["all", f"{calls + found.get(AROUND, (0.0, 0.0))[0]:.0f}", f"{whole:.3f}"])
    console.show(Sheet(["operator", "in a step", "ms"], rows, title=f"{bundle}: step of {batch} rows, past {past}"))


@contextmanager
def profiled(directory: Path) -> Iterator[None]:
    """Let sessions that are opened inside write profiles into a directory."""
    options_of = opening._session_options

    def with_profile(*arguments: Any) -> Any:
        options = options_of(*arguments)
        options.enable_profiling, options.profile_file_prefix = True, str(directory / "profile")
        return options

    setattr(opening, "_session_options", with_profile)  # noqa: B010  (of another signature)
    try:
        yield
    finally:
        setattr(opening, "_session_options", options_of)  # noqa: B010


def operators_of(events: Sequence[Mapping[str, Any]], steps: int) -> Operators:
    """Return the operators of a step, slowest first: means over the last steps of a profile."""
    runs = [event for event in events if event["name"] == "model_run"][-steps:]
    begin = runs[0]["ts"]
    counts, times = defaultdict[str, int](int), defaultdict[str, float](float)
    for event in events:
        if event["ts"] >= begin and event["name"].endswith("_kernel_time"):
            name = event["args"]["op_name"]
            counts[name] += 1
            times[name] += event["dur"] / 1e3
    ordered = sorted(times, key=lambda name: -times[name])
    return {name: (counts[name] / steps, times[name] / steps) for name in ordered}


def _profile(runtime: Runtime, batch: int, past: int, steps: int) -> list[dict[str, Any]]:
    decoder = runtime.decoder
    if not isinstance(decoder, SharedCacheDecoder):
        raise typer.BadParameter("steps are profiled of bundles with a shared cache: fp32, int8 and int4")
    ids = np.random.default_rng(0).integers(0, runtime.manifest.model.vocab_size, (batch, past)).tolist()
    factors = runtime.adapt(ids, mode="none").factors
    slots = decoder.slots(batch, past + steps + 1)
    slots.prefill(0, ids, factors)
    for _ in range(steps):
        slots.step([1] * batch, factors)
    events: list[dict[str, Any]] = json.loads(Path(decoder.session.end_profiling()).read_text())
    return events


if __name__ == "__main__":
    console.run(main)
