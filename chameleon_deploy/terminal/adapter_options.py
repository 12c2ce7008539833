"""The options of updates: PEFT directories for commands that export them, and for commands that run a bundle adapters,
their names and descriptions.
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

LoadedAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--load-adapter",
        metavar="NAME=PATH",
        help="An adapter file, a PEFT directory or the URL of either, which texts then choose by its name; may be "
        "given several times.",
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
    return {name: Path(path) for name, path in _by_name("--adapter", options, "NAME=DIR").items()}


def paths_by_name(options: Sequence[str] | None) -> dict[str, str]:
    """Return the paths or URLs of adapters that are to be loaded. Raises InputError."""
    return _by_name("--load-adapter", options, "NAME=PATH")


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


def _by_name(option: str, values: Sequence[str] | None, form: str) -> dict[str, str]:
    pairs = [value.partition("=") for value in values or ()]
    for name, separator, path in pairs:
        if not (name and separator and path):
            raise InputError(f"{option} {name}{separator}{path}: pass {form}")
    by_name = {name: path for name, _, path in pairs}
    if len(by_name) < len(pairs):
        raise InputError(f"{option}: two adapters have the same name")
    return by_name


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
