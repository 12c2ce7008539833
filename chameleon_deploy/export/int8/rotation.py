"""Rotate and scale a trunk without changing its function, so that int8 suffices for weights, activations and cache.

residual stream  rotated (hadamard.py) from after the embedding to before the last norm, which both stay unrotated.
                 Matrices that write to it write rotated values; the norms' weights are folded into the next matrices
values           rotated head by head, and rotated back by the output projection of attention
keys, values     divided by int8 scales (calibration.py), by which queries and the output projection are multiplied
norms            their outputs are divided by int8 scales too, by which the layers' matrices are multiplied

Everything but the two ends of the residual stream is done to the weights, once. Source: Ashkboos et al., "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs" (https://arxiv.org/abs/2404.00456). QuaRot rotates all channels at once
and removes the mean in a layer norm; blocks of 64 are as accurate here, and keep the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.families.family import Linear
from chameleon_deploy.export.int8.calibration import INT8_MAX, Absmax
from chameleon_deploy.export.int8.hadamard import block_of, rotate
from chameleon_deploy.reference.model import Trunk


@torch.no_grad()
def rotate_trunk(trunk: Trunk, model: ModelSpec) -> Trunk:
    """Return a copy with the residual stream and the values rotated. Its token embedding is the same."""
    rotated = Trunk(copy.deepcopy(trunk.causal_lm), trunk.tokenizer)
    family, head = family_of(model.architecture), block_of(model.head_dim)
    for layer in family.layers(rotated):
        _take_norm(layer.norm_1, [layer.q, layer.k, layer.v])
        _take_norm(layer.norm_2, layer.ups)
        for linear, block in ((layer.v, head), (layer.o, None), (layer.down, None)):
            linear.matrix.copy_(rotate(linear.matrix, block))
            if linear.bias is not None:
                linear.bias.copy_(rotate(linear.bias, block))
        layer.o.matrix.copy_(rotate(layer.o.matrix.T, head).T)
    if family.position_embedding:
        positions = rotated.causal_lm.get_parameter(family.position_embedding)
        positions.copy_(rotate(positions))
    rotated.causal_lm.get_input_embeddings().register_forward_hook(lambda module, inputs, output: rotate(output))
    family.last_norm_of(rotated).register_forward_pre_hook(lambda module, inputs: rotate(inputs[0]))
    return rotated


@torch.no_grad()
def scale_trunk(trunk: Trunk, model: ModelSpec, absmax: Sequence[Absmax]) -> None:
    """Scale keys, values and norm outputs to the range of int8, -127 to 127, without rounding them."""
    family, groups = family_of(model.architecture), model.num_attention_heads // model.num_key_value_heads
    for layer, seen in zip(family.layers(trunk), absmax, strict=True):
        _scale_norm(layer.norm_1, seen.norm_1 / INT8_MAX, [layer.q, layer.k, layer.v])
        _scale_norm(layer.norm_2, seen.norm_2 / INT8_MAX, layer.ups)
        key, value = seen.keys / INT8_MAX, seen.values / INT8_MAX
        if family.rotary_tables:  # the two coordinates of a rotary embedding share one scale
            key = torch.stack(key.chunk(2, -1)).amax(0).repeat(1, 2)
        _multiply_outputs(layer.q, key.repeat_interleave(groups, 0).flatten())
        _multiply_outputs(layer.k, 1 / key.flatten())
        _multiply_outputs(layer.v, 1 / value.flatten())
        layer.o.matrix.mul_(value.repeat_interleave(groups, 0).reshape(-1, 1))


def _take_norm(norm: Any, linears: list[Linear]) -> None:
    """Fold the weights of a norm into the matrices that follow it, whose inputs are rotated from then on."""
    bias: Tensor | None = getattr(norm, "bias", None)
    for linear in linears:
        if bias is not None and linear.bias is not None:
            linear.bias.add_(bias @ linear.matrix)
        linear.matrix.copy_(rotate((norm.weight[:, None] * linear.matrix).T).T)
    norm.weight.fill_(1)
    if bias is not None:
        bias.zero_()


def _scale_norm(norm: Any, scale: Tensor, linears: list[Linear]) -> None:
    """Divide a norm's outputs by scales, and multiply the matrices that follow it."""
    for parameter in norm.parameters():
        parameter.div_(scale)
    for linear in linears:
        linear.matrix.mul_(scale[:, None])


def _multiply_outputs(linear: Linear, factors: Tensor) -> None:
    linear.matrix.mul_(factors)
    if linear.bias is not None:
        linear.bias.mul_(factors)
