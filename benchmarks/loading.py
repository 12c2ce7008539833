"""How long a bundle and other engines take from their import to a first token, and how much memory they then hold.

    python -m benchmarks.loading BUNDLE --reference CHECKPOINT

Each engine is loaded by processes of its own (loading_worker.py), which take turns and hold nothing else. All files are
in the page cache. The other engines have the base model alone, in the bundle's precision.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import typer

import chameleon_deploy
from chameleon_deploy.bench.peers import open_peers
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import CheckFailedError
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet

WORKER = Path(__file__).with_name("loading_worker.py")
PEERS = {  # their loaders, and the files that they are converted to
    "CTranslate2": ("ctranslate2", "ctranslate2"),
    "OpenVINO": ("openvino", "openvino.xml"),
    "llama.cpp": ("llama_cpp", "*.gguf"),
}
PYTORCH = "PyTorch eager fp32"


class Loadable(NamedTuple):
    """What a loader of loading_worker.py loads: a file, or a directory."""

    loader: str
    path: Path

    @property
    def size(self) -> int:
        """Return the bytes of the file, with the weights beside it, or of all files of the directory."""
        beside = self.path.with_suffix(".bin")  # OpenVINO's weights
        files = self.path.rglob("*") if self.path.is_dir() else [self.path, beside]
        return sum(file.stat().st_size for file in files if file.is_file())


@dataclass(frozen=True)
class Loaded:
    """Medians over the processes of one engine.

    seconds   from its import to the first token of a prompt of eight
    resident  bytes of the process then, mapped files included
    peak      bytes at most until then
    size      bytes of its files
    """

    seconds: float
    resident: int
    peak: int
    size: int


def converted(bundle: Path, checkpoint: Checkpoint, threads: int, directory: Path) -> dict[str, Loadable]:
    """Write the base model for each other engine that is installed. Prints why one is missing."""
    runtime = chameleon_deploy.load(bundle, threads=threads)
    peers, missing = open_peers(runtime, checkpoint, threads, directory, True, list(PEERS))
    for name, why in missing.items():
        print(f"{name}: {why}", file=sys.stderr)
    found = {}
    for peer in peers[1:]:
        loader, pattern = PEERS[peer.name.split()[0]]
        # The longest name: llama.cpp's mix of types is quantised from the float32 file beside it.
        found[peer.name] = Loadable(loader, max(directory.glob(pattern), key=lambda file: len(file.name)))
    if runtime.manifest.precision == "fp32":
        checkpoint.trunk.causal_lm.save_pretrained(directory / "pytorch")
        found[PYTORCH] = Loadable("pytorch", directory / "pytorch")
    return found


def measure(
    engines: Mapping[str, Loadable], precision: str, threads: int, rounds: int, report: Progress
) -> dict[str, Loaded]:
    """Load every engine in a process of its own, `rounds` times in turn after one that warms the page cache.

    Raises CheckFailedError for a process that fails.
    """
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for sampling in range(1 + rounds):
        report("load", sampling, 1 + rounds)
        for name, (loader, path) in engines.items():
            command = [sys.executable, "-P", str(WORKER), loader, str(path), precision, str(threads)]
            done = subprocess.run(  # noqa: S603  (our own interpreter and code)
                command, capture_output=True, text=True, check=False, env=environment
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1]
                raise CheckFailedError(f"{name}: exit code {done.returncode}: {last}")
            samples[name].append(json.loads(done.stdout.splitlines()[-1]))
    report("load", 1 + rounds, 1 + rounds)

    def median(name: str, figure: str) -> float:
        return statistics.median(sample[figure] for sample in samples[name][1:])

    return {
        name: Loaded(median(name, "seconds"), int(median(name, "resident")), int(median(name, "peak")), engine.size)
        for name, engine in engines.items()
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    reference: Annotated[Path, typer.Option(help="The checkpoint that the bundle was exported from.")],
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each engine.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every engine; default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON to this file.")] = None,
) -> None:
    """Measure the time to load, the memory and the files of a bundle and of other engines in its precision."""
    console.check_output(json_file)
    threads, precision = threads or os.cpu_count() or 1, open_bundle(bundle).manifest.precision
    with TemporaryDirectory() as directory, console.progress() as progress:
        engines = {f"bundle {precision}": Loadable("bundle", bundle)}
        engines |= converted(bundle, load_checkpoint(reference), threads, Path(directory))
        loaded = measure(engines, precision, threads, rounds, progress)
    rows = [
        [name, f"{one.seconds:.2f}", *(f"{size / 1e6:.0f}" for size in (one.resident, one.peak, one.size))]
        for name, one in loaded.items()
    ]
    heads = ["engine", "import to first token, s", "resident, MB", "peak, MB", "files, MB"]
    console.show(Sheet(heads, rows, f"Loading {bundle.name}", ", ".join(describe_machine().values())))
    if json_file:
        console.write_json({name: asdict(one) for name, one in loaded.items()}, json_file)


if __name__ == "__main__":
    console.run(main)
