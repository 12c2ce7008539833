"""Recipes: what to build, in TOML. The files stand in the top-level export/."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from chameleon_deploy.errors import RecipeError


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """checkpoint  a directory relative to the recipe, as for the command line
    base        the base model, where the checkpoint's own reference does not hold
    precision   of the weights
    target      the graphs to build"""

    checkpoint: str
    base: str | None = None
    precision: Literal["fp32"] = "fp32"
    target: Literal["onnx"] = "onnx"


def read_recipe(path: Path) -> Recipe:
    """Read a recipe and resolve its paths. Raises RecipeError."""
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text("utf-8")), Recipe)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise RecipeError(f"{path}: {error}") from error
    base = recipe.base
    if base is not None and (path.parent / base).is_dir():
        base = str(path.parent / base)
    return msgspec.structs.replace(recipe, checkpoint=str(path.parent / recipe.checkpoint), base=base)
