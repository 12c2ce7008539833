"""What the export and the verification of a base model cost, and how near the bundle is to it.

    python -m benchmarks.export_cost models/qwen2.5-coder-0.5b.gguf --out models/qwen-int8 --precision int8

Peak memory is that of this process on Linux: the pages of mapped files that it has touched count too.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from chameleon_deploy.contract.bundle import Precision, open_bundle
from chameleon_deploy.export.__main__ import main as export
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.runtime.decode.bound_call import BoundCall
from chameleon_deploy.runtime.decode.growing_cache import GrowingCacheDecoder
from chameleon_deploy.runtime.known_answers import PARITY
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.verify import run
from chameleon_deploy.verify.run import verify_bundle

# Who reads tokens: a method, and how many its call reads.
READERS: tuple[tuple[str, type, str, Callable[..., int]], ...] = (
    ("reference", Trunk, "hidden_states", lambda trunk, input_ids, *_, **__: int(input_ids.numel())),
    ("decoder_cpu", BoundCall, "run", lambda call: int(call.input_ids.size)),
    ("decoder", GrowingCacheDecoder, "_run", lambda decoder, input_ids, *_: int(input_ids.size)),
)
FIGURES = ("KL, mean", "KL, 99.9th percentile", "perplexity, relative difference")


@dataclass
class Step:
    """What a part of the work took.

    seconds, processor_seconds  of a clock, and of all cores together
    peak_gb                     resident memory at its largest
    tokens                      that were read, by the reference and by each graph
    """

    seconds: float
    processor_seconds: float
    peak_gb: float
    tokens: dict[str, int]


class Meter:
    """Measures one step after another."""

    def __init__(self) -> None:
        self._tokens = Counter[str]()
        for name, kind, method, size in READERS:
            setattr(kind, method, self._counting(name, getattr(kind, method), size))
        self._begin()

    def step(self) -> Step:
        """Return what was taken since the last step."""
        found = Step(
            time.monotonic() - self._began,
            time.process_time() - self._processor,
            _status("VmHWM") * 1024 / 1e9,
            dict(self._tokens),
        )
        self._begin()
        return found

    def _begin(self) -> None:
        self._tokens.clear()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        self._began, self._processor = time.monotonic(), time.process_time()

    def _counting(self, name: str, method: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        @wraps(method)
        def counted(*arguments: Any, **named: Any) -> Any:
            self._tokens[name] += size(*arguments, **named)
            return method(*arguments, **named)

        return counted


def _status(field: str) -> int:
    """Return a field of this process's status, in kB."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise LookupError(f"/proc/self/status has no {field}")
    return int(found[1])


def main(
    source: Annotated[str, typer.Argument(metavar="BASE", help="A base model, see `chameleon_deploy.export`.")],
    out: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    precision: Annotated[Precision, typer.Option(help="Precision of the weights.")] = "fp32",
    max_kl: Annotated[float | None, typer.Option(min=0, help="See `chameleon_deploy.export`.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Export and verify a base model, and print what both took and how near the bundle is."""
    console.check_output(as_json)
    meter, steps = Meter(), dict[str, Step]()

    def verified(*arguments: Any) -> Any:
        steps["export"] = meter.step()
        return verify_bundle(*arguments)

    setattr(run, "verify_bundle", verified)  # noqa: B010  (export looks for it there)
    export(source=source, out=out, precision=precision, max_kl=max_kl)
    steps["verify"] = meter.step()
    manifest = open_bundle(out).manifest
    parity = json.loads((out / PARITY).read_text())
    figures = {
        f"{check['graph']}: {check['name']}": {name: check[name] for name in ("value", "limit", "note")}
        for check in parity["checks"]
        if check["name"].endswith(FIGURES)
    }
    record = {
        "machine": describe_machine(parity["integer_weights"]),
        "model": source,
        "precision": precision,
        "float32_gb": manifest.parameters.base * 4 / 1e9,
        "bundle_gb": sum(file.size for file in manifest.files.values()) / 1e9,
        "texts_tokens": parity["tokens"],
        **{name: asdict(step) for name, step in steps.items()},
        "figures": figures,
    }
    for name, step in steps.items():
        console.stdout.print(
            f"{name}: {step.seconds / 60:.1f} min, {step.processor_seconds / 60:.1f} of processors, "
            f"{step.peak_gb:.2f} GB, tokens {step.tokens}"
        )
    for name, figure in figures.items():
        console.stdout.print(f"{name}: {figure['value']:.3g} {figure['note']}")
    if as_json:
        console.write_json(record, as_json)


if __name__ == "__main__":
    console.run(main)
