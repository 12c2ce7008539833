"""The basis of an int8 graph's linear layers, which factors enter when a runtime loads them (runtime/basis.py).

rotation.py rotates and scales what linear layers read and write. Factors of an adapter are of the layers as they were:
A follows the change of a layer's input, B that of its output, exactly as the layer's own matrix does. Adapter files are
therefore the same for every precision.

A layer norm's bias and the centres of its outputs and of the values, which rotation.py folds into the biases of the
next layers, are missing from what A reads. They are added back as a shift of A's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import LM_HEAD, FloatArray, ModelSpec
from chameleon_deploy.contract.manifest import basis_names
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.families.family import bias_of
from chameleon_deploy.export.hadamard import block_of, rotate
from chameleon_deploy.export.int8.calibration import (
    Extremes,
    FirstToken,
    centre_and_steps,
    key_steps,
    steps_of,
    value_centre_and_steps,
)
from chameleon_deploy.reference.model import Trunk

SMALLEST = 1e-6  # of a norm's weight, as a share of the largest: its bias is divided by it


class Basis:
    """The basis of every layer.

    tensors  what basis.safetensors has of a layer, see `basis_names`
    shifts   [in_features], for layers whose inputs are centred
    """

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.shifts: dict[str, FloatArray] = {}

    def of(self, targets: Sequence[str]) -> tuple[dict[str, np.ndarray], Mapping[str, FloatArray]]:
        """Return tensors and shifts of some layers."""
        names = [name for target in targets if target != LM_HEAD for name in basis_names(target)]
        return {n: self.tensors[n] for n in names}, {t: self.shifts[t] for t in targets if t in self.shifts}

    def add(self, layer: str, before: Tensor, block: int, after: Tensor, out_blocks: list[int], out: Tensor) -> None:
        values = (before, torch.tensor([block]), after, torch.tensor(out_blocks), out)
        self.tensors |= {
            name: np.ascontiguousarray(value.detach().numpy())
            for name, value in zip(basis_names(layer), values, strict=True)
        }


@torch.no_grad()
def basis_of(
    trunk: Trunk,
    model: ModelSpec,
    extremes: Sequence[Extremes],
    first_tokens: Sequence[FirstToken] = (),
    balances: Sequence[Tensor | None] = (),
) -> Basis:
    """Return the basis that `rotate_trunk`, `balance_trunk` and `scale_trunk` give a trunk.

    trunk         the base model, which is not rotated
    extremes      of every layer, of the statistics that are passed to `scale_trunk`
    first_tokens  of every layer, of the same; none if it has not been called
    balances      of every layer, from `balance_trunk`; none if it has not been called
    """
    family, basis = family_of(model.architecture), Basis()
    residual, head = block_of(model.hidden_size), block_of(model.head_dim)
    groups = model.num_attention_heads // model.num_key_value_heads
    balances = balances or [None] * model.num_layers
    for i, (layer, seen, balance) in enumerate(zip(family.layers(trunk), extremes, balances, strict=True)):
        names = family.layer_targets(i)
        key, value = key_steps(seen), steps_of(seen.values)
        if family.rotary_tables is not None:  # scaled in the graph
            key = torch.ones_like(key)
        of_queries = value.repeat_interleave(groups, 0).flatten()
        outputs = [(1, key.repeat_interleave(groups, 0).flatten()), (1, 1 / key.flatten()), (head, 1 / value.flatten())]
        if len(names.qkv) == 1:  # one layer has all three
            joined = [([block for block, _ in outputs], torch.cat([scale for _, scale in outputs]))]
        else:
            joined = [([block], scale) for block, scale in outputs]
        inner = torch.ones(len(layer.down.matrix))
        ups = [([1], inner) for _ in layer.ups]
        if balance is not None:
            ups[1] = [1], balance
        for norm, seen_norm, targets, outs in (
            (layer.norm_1, seen.norm_1, names.qkv, joined),
            (layer.norm_2, seen.norm_2, names.up, ups),
        ):
            weight, bias = norm.weight, bias_of(norm)
            shift, steps = centre_and_steps(seen_norm)
            if bias is not None:
                least = SMALLEST * weight.abs().max()
                weight = torch.where(weight.abs() < least, least, weight)
                shift = shift + rotate(bias / weight)
            for target, (blocks, out) in zip(targets, outs, strict=True):
                basis.add(target, weight, residual, steps, blocks, out)
                basis.shifts[target] = (shift / steps).numpy()
        hidden = torch.ones(model.hidden_size)
        basis.add(names.o[0], torch.ones_like(of_queries), head, of_queries, [residual], hidden)
        if first_tokens:
            centre, _ = value_centre_and_steps(seen, first_tokens[i])
            basis.shifts[names.o[0]] = (centre / value).repeat_interleave(groups, 0).flatten().numpy()
        basis.add(names.down[0], inner, 1, 1 / (inner if balance is None else balance), [residual], hidden)
    return basis
