"""Rotate and scale a trunk without changing its function, so that int8 suffices for weights, activations and cache.

residual stream  rotated (hadamard.py) from after the embedding to before the last norm, which both stay unrotated.
                 Matrices that write to it write rotated values; the norms' weights are folded into the next matrices
values           rotated head by head, and rotated back by the output projection of attention
keys, values     divided by int8 scales (calibration.py), by which queries and the output projection are multiplied; a
                 centre is subtracted from their biases, and that of the values is in the output projection's bias. With
                 a rotary embedding, which turns pairs of coordinates into each other, keys and queries are scaled and
                 centred in the graph (cache.py)
norms            the centre of each channel's range is subtracted from their outputs, and its product with each next
                 matrix is added to the bias; then they are divided by int8 scales, by which the matrices are multiplied
gated products   of a Llama's MLP: each channel is multiplied by a factor, by which the output projection is divided, so
                 that a channel of large values has small weights, and the reverse

Everything but the two ends of the residual stream is done to the weights, once. Source: Ashkboos et al., "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs" (https://arxiv.org/abs/2404.00456). QuaRot rotates all channels at once
and removes the mean in a layer norm; blocks of 64 are as accurate here, and keep the mean.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import FloatArray, ModelSpec
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.families.family import Linear, bias_of
from chameleon_deploy.export.hadamard import block_of, rotate
from chameleon_deploy.export.int8.calibration import (
    Statistics,
    centre_and_steps,
    key_centre_and_steps,
    value_centre_and_steps,
)
from chameleon_deploy.reference.model import Trunk


@torch.no_grad()
def rotate_trunk(trunk: Trunk, model: ModelSpec) -> Trunk:
    """Return a copy with the residual stream and the values rotated. Its token embedding is the same."""
    rotated = Trunk(copy.deepcopy(trunk.causal_lm), trunk.tokenizer)
    family, head = family_of(model.architecture), block_of(model.head_dim)
    family.add_biases(rotated)
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
def balance_trunk(trunk: Trunk, model: ModelSpec, statistics: Statistics) -> list[Tensor | None]:
    """Balance the channels of gated products, and change the statistics of the inputs that this changes. Returns the
    factors of every layer, [channels], or None for a layer without a gate. In SmolLM2-135M this divides the cost of
    rounding them by 1.2 to 140.
    """
    balances: list[Tensor | None] = []
    for layer in family_of(model.architecture).layers(trunk):
        if len(layer.ups) < 2:  # an activation function in between
            balances.append(None)
            continue
        squares = statistics.inputs[layer.names.down].squares()
        weights = layer.down.matrix.square().sum(1)
        factors = balance(squares, weights)
        _multiply_outputs(layer.ups[1], factors)
        layer.down.matrix.div_(factors[:, None])
        statistics.inputs[layer.names.down].divide(1 / factors)
        balances.append(factors)
    return balances


def balance(squares: Tensor, weights: Tensor) -> Tensor:
    """Return factors for the channels of rows that are rounded with a scale for each row, [channels].

    squares  of the channels, summed over tokens
    weights  the sum of squares of each channel's weights

    Rounding a row costs the product of two sums: of the channels' mean squares, and of the squares of their weights.
    Factors change neither term of a channel's own product, and the two sums are smallest where both terms of each
    channel are equal.
    """
    return (_relative(weights) / _relative(squares)) ** 0.25


def _relative(values: Tensor) -> Tensor:
    """Divide by the mean, and bound what is close to zero."""
    return (values / values.mean().clamp_min(1e-30)).clamp_min(1e-6)


@torch.no_grad()
def scale_trunk(trunk: Trunk, model: ModelSpec, statistics: Statistics) -> None:
    """Centre and scale keys, values and norm outputs to the range of int8, -127 to 127, without rounding them, and
    change the statistics of the inputs that this changes.
    """
    family, groups = family_of(model.architecture), model.num_attention_heads // model.num_key_value_heads
    for layer, seen, first in zip(family.layers(trunk), statistics.layers, statistics.first_tokens, strict=True):
        for norm, extremes, name, linears in (
            (layer.norm_1, seen.norm_1, layer.names.qkv, [layer.q, layer.k, layer.v]),
            (layer.norm_2, seen.norm_2, layer.names.up, layer.ups),
        ):
            centre, steps = centre_and_steps(extremes)
            if bias_of(norm) is not None:
                _centre_norm(norm, centre, linears)
            _scale_norm(norm, steps, linears)
            statistics.inputs[name].subtract(centre)
            statistics.inputs[name].divide(steps)
        if family.rotary_tables is None:
            centre, key = key_centre_and_steps(seen, first)
            _required(layer.k.bias).sub_(centre.flatten())
            _multiply_outputs(layer.q, key.repeat_interleave(groups, 0).flatten())
            _multiply_outputs(layer.k, 1 / key.flatten())
        centre, value = value_centre_and_steps(seen, first)
        _required(layer.v.bias).sub_(centre.flatten())
        _multiply_outputs(layer.v, 1 / value.flatten())
        centres, values = (x.repeat_interleave(groups, 0).flatten() for x in (centre, value))
        _required(layer.o.bias).add_(centres @ layer.o.matrix)
        layer.o.matrix.mul_(values[:, None])
        statistics.inputs[layer.names.o].subtract(centres)
        statistics.inputs[layer.names.o].divide(values)


def turned_keys(model: ModelSpec, statistics: Statistics) -> list[tuple[FloatArray, FloatArray]] | None:
    """Return the centre, in steps, and the steps of every layer's keys behind a rotary embedding, [key-value heads *
    head_dim] each; None without one, since `scale_trunk` has taken them into the matrices.
    """
    if family_of(model.architecture).rotary_tables is None:
        return None
    found = map(key_centre_and_steps, statistics.layers, statistics.first_tokens)
    return [((centre / steps).flatten().numpy(), steps.flatten().numpy()) for centre, steps in found]


def _take_norm(norm: Any, linears: list[Linear]) -> None:
    """Fold the parameters of a norm into the layers that follow it, whose inputs are rotated from then on."""
    if (bias := bias_of(norm)) is not None:
        _centre_norm(norm, bias.clone(), linears)
    for linear in linears:
        linear.matrix.copy_(rotate((norm.weight[:, None] * linear.matrix).T).T)
    norm.weight.fill_(1)


def _centre_norm(norm: Any, centre: Tensor, linears: list[Linear]) -> None:
    """Subtract a vector from a norm's outputs, and add its product with each next matrix to that layer's bias."""
    norm.bias.sub_(centre)
    for linear in linears:
        _required(linear.bias).add_(centre @ linear.matrix)


def _required(bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError("a layer has no bias to take a centre: see Family.add_biases")
    return bias


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
