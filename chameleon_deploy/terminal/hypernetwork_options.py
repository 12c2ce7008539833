"""The options that name a released text-to-LoRA network, of the commands that read one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

HypernetworkDirectory = Annotated[
    Path | None,
    typer.Option(
        "--hypernetwork", metavar="DIR", help="A released text-to-LoRA network of a base model: hypermod.pt, args.yaml."
    ),
]
EncoderDirectory = Annotated[
    Path | None,
    typer.Option(
        "--encoder",
        metavar="DIR",
        help="Sentence encoder of texts that describe tasks, as of sentence-transformers.",
    ),
]
TargetOrder = Annotated[
    str | None,
    typer.Option(
        "--target-order",
        metavar="NAME,NAME,...",
        help="Its module types in the order of the process that trained it, which its files do not say.",
    ),
]
