"""The linear layers that factors update, by their PEFT names."""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_deploy.contract.bundle import LM_HEAD, TargetSpec
from chameleon_deploy.errors import CheckpointError, InputError
from chameleon_deploy.reference.families import LAYER_GROUPS
from chameleon_deploy.reference.model import Trunk


def choose_targets(trunk: Trunk, chosen: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the chosen layers, in the model's order.

    chosen  groups (attention, mlp, all), whole names, or ends of names as in PEFT's target_modules, such as q_proj

    Raises InputError for a choice that names no layer.
    """
    layers, found = list(trunk.linear_layers()), set()
    for choice in chosen:
        if choice in LAYER_GROUPS:
            named = {layer for layer in layers if any(part in layer for part in LAYER_GROUPS[choice])}
        else:
            named = {layer for layer in layers if layer == choice or layer.endswith(f".{choice}")}
        if not named:
            ends = sorted({layer.rpartition(".")[2] for layer in layers})
            raise InputError(
                f"no linear layer is named {choice!r}: choose {', '.join(LAYER_GROUPS)}, {', '.join(ends)}"
            )
        found |= named
    return tuple(layer for layer in layers if layer in found)


def target_specs(trunk: Trunk, names: Sequence[str]) -> tuple[TargetSpec, ...]:
    """Return the targets of these names with their sizes. Raises CheckpointError for none, unknown or equal names."""
    layers = trunk.linear_layers()
    if not names or len(set(names)) < len(names):
        raise CheckpointError(f"targets {list(names)}: name at least one layer, and each layer once")
    if unknown := [name for name in names if name not in layers]:
        raise CheckpointError(f"the base model has no linear layer {unknown[0]!r}, which the targets name")
    return tuple(TargetSpec(name, *layers[name]) for name in names)


def in_head_alone(targets: Sequence[str]) -> bool:
    """Return whether only the head is updated, so that hidden states do not depend on the factors."""
    return tuple(targets) == (LM_HEAD,)
