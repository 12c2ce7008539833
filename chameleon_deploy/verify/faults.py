"""Faults of factors that `verify` plants: each must move a bundle's logits as far as it moves the reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chameleon_deploy.contract.bundle import AdaptationSpec, factor_names

Stacks = Mapping[str, Any]  # factor sets by tensor name: arrays of numpy or tensors of PyTorch
Fault = Callable[[AdaptationSpec, Stacks], Stacks]


def swapped_layers(spec: AdaptationSpec, stacks: Stacks) -> Stacks:
    """Every layer with the factors of the next layer of the same sizes."""
    changed = dict(stacks)
    for sizes in {(target.in_features, target.out_features) for target in spec.targets}:
        alike = [t.name for t in spec.targets if (t.in_features, t.out_features) == sizes]
        for layer, other in zip(alike, [*alike[1:], alike[0]], strict=True):
            changed |= {a: stacks[b] for a, b in zip(factor_names(layer), factor_names(other), strict=True)}
    return changed


def doubled_scaling(spec: AdaptationSpec, stacks: Stacks) -> Stacks:
    return {name: stack + stack if name.endswith(".lora_B") else stack for name, stack in stacks.items()}


FAULTS: dict[str, Fault] = {"layers swapped": swapped_layers, "scaling doubled": doubled_scaling}
