"""The options of updates: PEFT directories for commands that read them, names and descriptions for those that run a
bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.errors import InputError

AdapterDirectories = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=DIR",
        help="A PEFT LoRA directory, of any linear layers of a base model; may be given several times.",
    ),
]
AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME",
        help="Adapter of all texts, or one per text in order; A=0.7,B=0.3 is a blend, '' is the base model.",
    ),
]

Descriptions = Annotated[
    list[str] | None,
    typer.Option(
        "--adapt-text",
        metavar="TEXT",
        help="Mode request of a bundle with an encoder: what the task is, of all texts, or one per text in order.",
    ),
]


def named_directories(options: Sequence[str] | None) -> dict[str, Path]:
    """Return directories by name. Raises InputError."""
    pairs = [option.partition("=") for option in options or ()]
    for name, separator, path in pairs:
        if not (name and separator and path):
            raise InputError(f"--adapter {name}{separator}{path}: pass NAME=DIR")
    directories = {name: Path(path) for name, _, path in pairs}
    if len(directories) < len(pairs):
        raise InputError("--adapter: two adapters have the same name")
    return directories


def adapters_of_texts(names: Sequence[str] | None, texts: int) -> list[str | dict[str, float] | None] | None:
    """Return the adapter or the weights of each text, from one option or one per text; None without the option.

    Raises InputError.
    """
    if not names:
        return None
    each = _of_texts("--adapter", names, texts)
    return [_weights(name) if "=" in name else name or None for name in each]


def descriptions_of_texts(descriptions: Sequence[str] | None, texts: int) -> list[str] | None:
    """Return the description of each text, from one option or one per text; None without the option.

    Raises InputError.
    """
    return _of_texts("--adapt-text", descriptions, texts) if descriptions else None


def _of_texts(option: str, values: Sequence[str], texts: int) -> list[str]:
    if len(values) not in (1, texts):
        raise InputError(f"{option} is given {len(values)} times for {texts} texts: pass it once, or once per text")
    return list(values) * texts if len(values) == 1 else list(values)


def _weights(option: str) -> dict[str, float]:
    """Return the weights by name of an option such as legal=0.7,code=0.3. Raises InputError."""
    weights: dict[str, float] = {}
    for part in option.split(","):
        name, separator, weight = part.partition("=")
        try:
            if not separator or name in weights:
                raise ValueError
            weights[name] = float(weight)
        except ValueError as error:
            raise InputError(f"--adapter {option}: pass NAME, or NAME=WEIGHT,... with each name once") from error
    return weights
