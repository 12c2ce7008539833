"""`python -m chameleon_deploy.engines`: build the TensorRT engines of a bundle into the local cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.export.tensorrt import build_engines
from chameleon_deploy.terminal import console


def main(bundle: Annotated[Path, typer.Argument(help="Bundle directory.")]) -> None:
    """Build the engines of a bundle for this machine's GPU, or for any with TensorRT for RTX, and print their path.

    Engines that are in the local cache already are not built again.
    """
    with console.progress() as report:
        path, device = build_engines(bundle, report)
    size = sum(file.stat().st_size for file in path.iterdir())
    console.stdout.print(
        f"{path}: {size / 1e6:.1f} MB, engines for {device.name} (compute capability {device.compute_capability})",
        soft_wrap=True,  # a path is copied from the terminal in one piece
    )


if __name__ == "__main__":
    console.run(main)
