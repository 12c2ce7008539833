"""The curves: what grows, and the points that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CurveName(StrEnum):
    """What grows."""

    BATCH = "batch"
    LENGTH = "length"
    FACTOR_SETS = "factor_sets"


CURVES = tuple(CurveName)

STEPS = 16  # after the first token
PAST = 128  # tokens of each prompt where the length is not what grows
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (32, 128, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Point:
    """One generation: `batch` prompts of `width` tokens, then `steps` steps.

    x            the place on the curve
    factor_sets  that the rows share evenly; None for those of their clusters
    """

    x: int
    batch: int
    width: int
    steps: int = STEPS
    factor_sets: int | None = None


def points(curve: CurveName, max_positions: int, largest: int | None = None) -> list[Point]:
    """Return the points of a curve that a model has positions for.

    largest  the largest x; None for all

    The last length leaves room for the steps: it is as near to the model's positions as fits.
    """
    room = max_positions - STEPS - 1
    width = min(PAST, room)
    if curve is CurveName.BATCH:
        found = [Point(batch, batch, width) for batch in BATCHES]
    elif curve is CurveName.LENGTH:
        widths = dict.fromkeys(min(length, room) for length in LENGTHS)
        found = [Point(length, 1, length) for length in widths]
    else:
        found = [Point(count, max(BATCHES), width, factor_sets=count) for count in BATCHES]
    return [point for point in found if largest is None or point.x <= largest]
