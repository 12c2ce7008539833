"""Optimization profiles: the shapes that a TensorRT engine accepts, from the limits in the manifest.

A profile gives every symbol of a graph's shapes ("batch", "past", ...) a range. Engines are fastest at `opt` and
refuse shapes outside `min` and `max`.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-with-dynamic-shapes.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from chameleon_deploy.contract.bundle import GraphSpec, Manifest, TensorSpec
from chameleon_deploy.errors import ProfileError

PREFILL, DECODE = 0, 1  # the profiles of a decoder's engine, by index; other engines have one


class Range(NamedTuple):
    min: int
    opt: int
    max: int


class Profile(NamedTuple):
    name: str
    ranges: Mapping[str, Range]

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the least, usual and largest shape of an input. Raises ProfileError for an unknown symbol."""
        unknown = [size for size in tensor.shape if isinstance(size, str) and size not in self.ranges]
        if unknown:
            raise ProfileError(f"profile {self.name} has no range for {unknown[0]!r} of {tensor.name}")
        smallest, usual, largest = (
            tuple(self.ranges[size][which] if isinstance(size, str) else size for size in tensor.shape)
            for which in range(3)
        )
        return smallest, usual, largest

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(
            f"{symbol} {r.min}..{r.opt}..{r.max}" for symbol, r in sorted(self.ranges.items())
        )


def profiles(manifest: Manifest, graph: GraphSpec) -> tuple[Profile, ...]:
    """Return the profiles of a graph's engine: prefill and decode for a decoder with a growing cache, else one.

    prefill  whole prompts with an empty cache; logits of one position, or of all when scoring
    decode   one token per row with at least one token in the cache
    """
    limits, spec = manifest.limits, manifest.adaptation
    batch, factor_sets = _up_to(limits.batch, 8), _up_to(limits.factor_sets, 4)
    sequence, one, none = _up_to(limits.sequence, 128), Range(1, 1, 1), Range(0, 0, 0)
    positions = Range(1, 1, limits.sequence)
    match graph.role:
        case "hypernetwork":
            most = max(limits.factor_sets, spec.num_clusters)  # all centroids at once
            return (Profile("generate", {"factor_sets": _up_to(most, 4)}),)
        case "chooser":
            return (Profile("choose", {"batch": batch, "positions": one}),)
        case "logits_scorer":
            return (Profile("score", {"batch": batch, "positions": sequence}),)
    rows = {"batch": batch, "factor_sets": factor_sets, "rank": Range(1, spec.rank, spec.rank)}
    past = _up_to(limits.past, 128)
    total = Range(*(size + 1 for size in past))
    prefill = {**rows, "sequence": sequence, "positions": positions, "past": none, "total": sequence}
    decode = {**rows, "sequence": one, "positions": one, "past": past, "total": total}
    return Profile("prefill", prefill), Profile("decode", decode)


def check_profile(profile: Profile, max_positions: int) -> None:
    """Raise ProfileError unless 0 <= min <= opt <= max everywhere and all tokens fit into the model's positions."""
    for symbol, r in profile.ranges.items():
        if not 0 <= r.min <= r.opt <= r.max:
            raise ProfileError(
                f"profile {profile.name}: {symbol} {r.min}..{r.opt}..{r.max} is not 0 <= min <= opt <= max"
            )
    nothing = Range(0, 0, 0)
    longest = profile.ranges.get("past", nothing).max + profile.ranges.get("sequence", nothing).max
    if longest > max_positions:
        raise ProfileError(
            f"profile {profile.name} reaches {longest} tokens of a row, the model has {max_positions} positions"
        )


def _up_to(most: int, usual: int) -> Range:
    return Range(1, min(usual, most), most)
