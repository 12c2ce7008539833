"""Recipes: what to build, in TOML. The files are in the top-level export/."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from chameleon_deploy.contract.bundle import LimitsSpec, ModelSpec, Precision, limits_fault
from chameleon_deploy.contract.manifest import Int64
from chameleon_deploy.errors import RecipeError


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest call that engines are built for; see LimitsSpec. None takes the default of `resolve`.

    batch        32
    sequence     the model's positions, at most 1,024
    past         all of the model's positions but one
    factor_sets  enough for any batch, and for all centroids at once
    """

    batch: Int64 = 32
    sequence: Int64 | None = None
    past: Int64 | None = None
    factor_sets: Int64 | None = None

    def resolve(self, model: ModelSpec, num_clusters: int) -> LimitsSpec:
        """Return the numbers for one model. Raises RecipeError for a number below 1 or outside the model's
        positions.
        """
        limits = LimitsSpec(
            batch=self.batch,
            sequence=min(model.max_positions, 1024) if self.sequence is None else self.sequence,
            past=model.max_positions - 1 if self.past is None else self.past,
            factor_sets=max(self.batch, num_clusters) if self.factor_sets is None else self.factor_sets,
        )
        if fault := limits_fault(limits, model):
            raise RecipeError(f"{fault}: change [limits] in the recipe")
        return limits


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recipe file.

    checkpoint  a directory relative to the recipe, as for the command line: a checkpoint's or a base model's
    base        the base model, if the checkpoint's reference to it does not hold
    adaptable   layers of a base model that later adapters may update
    max_rank    the largest rank of those
    precision   of the weights
    limits      the largest call that engines are built for
    """

    checkpoint: str
    base: str | None = None
    adaptable: list[str] = []
    max_rank: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)] | None = None
    precision: Precision = "fp32"
    limits: Limits = Limits()


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
