"""The basis of an int8 graph's linear layers, which factors enter when a runtime loads them (runtime/basis.py).

rotation.py rotates and scales what linear layers read and write. Factors of an adapter are of the layers as they were:
A follows the change of a layer's input, B that of its output, exactly as the layer's own matrix does. Adapter files are
therefore the same for every precision.

A layer norm's bias and the centres of its outputs and of the values, which rotation.py folds into the biases of the
next layers, are missing from what A reads. They are added back as a shift of A's input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import LM_HEAD, FloatArray
from chameleon_deploy.contract.manifest import basis_names
from chameleon_deploy.export.hadamard import block_of, rotate
from chameleon_deploy.export.int8.calibration import (
    Extremes,
    FirstToken,
    centre_and_steps,
    key_steps,
    steps_of,
    value_centre_and_steps,
)
from chameleon_deploy.export.int8.layers import layers_of
from chameleon_deploy.reference.families.spec import DecoderSpec
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
    spec, basis = trunk.spec, Basis()
    residual, head, hidden = block_of(spec.hidden_size), block_of(spec.head_dim), torch.ones(spec.hidden_size)
    groups = spec.num_attention_heads // spec.num_key_value_heads
    balances = balances or [None] * spec.num_layers
    for i, (layer, seen, balance) in enumerate(zip(layers_of(trunk), extremes, balances, strict=True)):
        targets = layer.targets
        key, value = key_steps(seen), steps_of(seen.values)
        if not spec.scales_keys(i):  # scaled in the graph
            key = torch.ones_like(key)
        of_queries = value.repeat_interleave(groups, 0)
        inner = torch.ones(len(layer.down.matrix))
        outputs = (
            _of_heads(spec, targets.qkv, key.repeat_interleave(groups, 0), 1 / key, 1 / value),
            _joined(targets.up, [([1], inner), ([1], inner if balance is None else balance)][-len(layer.ups) :]),
        )
        seen_norms = seen.norm_1, seen.norm_2
        for names, (norm, *_), seen_norm, outs in zip(
            (targets.qkv, targets.up), layer.after_norms, seen_norms, outputs, strict=True
        ):
            before, after, shift = hidden, hidden, None
            if norm is not None:
                before, bias = norm.weight, norm.bias
                shift, after = centre_and_steps(seen_norm)
                if bias is not None:
                    least = SMALLEST * before.abs().max()
                    before = torch.where(before.abs() < least, least, before)
                    shift = shift + rotate(bias / before)
            for name, (blocks, out) in zip(names, outs, strict=True):
                basis.add(name, before, residual, after, blocks, out)
                if shift is not None:
                    basis.shifts[name] = (shift / after).numpy()
        # What a norm takes is not rotated.
        of_o, of_down = ([residual] if norm is None else [1] for norm in layer.post_norms)
        basis.add(targets.o[0], torch.ones(of_queries.numel()), head, of_queries.flatten(), of_o, hidden)
        if first_tokens:
            centre, _ = value_centre_and_steps(seen, first_tokens[i])
            basis.shifts[targets.o[0]] = (centre / value).repeat_interleave(groups, 0).flatten().numpy()
        basis.add(targets.down[0], inner, 1, 1 / (inner if balance is None else balance), of_down, hidden)
    return basis


# How many channels of a linear layer's outputs are rotated together, in each of parts of equal width, and the factors
# of all channels.
Outputs = tuple[list[int], Tensor]


def _of_heads(spec: DecoderSpec, targets: Sequence[str], q: Tensor, k: Tensor, v: Tensor) -> list[Outputs]:
    """Return the outputs of the projections to queries, keys and values, whose factors are q, k and v [heads,
    head_dim].
    """
    head = block_of(spec.head_dim)
    if len(targets) == 1 and spec.interleaved:
        return [([1, 1, head] * len(q), torch.stack([q, k, v], 1).flatten())]
    return _joined(targets, [([1], q.flatten()), ([1], k.flatten()), ([head], v.flatten())])


def _joined(targets: Sequence[str], parts: list[Outputs]) -> list[Outputs]:
    """Return the outputs of each linear layer: one of the parts, or if there is only one layer all of them."""
    if len(targets) == len(parts):
        return parts
    width = math.gcd(*(len(factors) for _, factors in parts))
    blocks = [block for (block,), factors in parts for _ in range(len(factors) // width)]
    return [(blocks, torch.cat([factors for _, factors in parts]))]
