"""Rotate and scale a trunk without changing its function, so that int8 suffices for weights, activations and cache.

residual stream  rotated (hadamard.py) from after the embedding to before the last norm, which both stay unrotated.
                 Matrices that write to it write rotated values; the norms' weights are folded into the next matrices.
                 What a norm writes to it, in Gemma and OLMo 2, is rotated in the graph (weights.py)
values           rotated head by head, and rotated back by the output projection of attention
keys, values     divided by int8 scales (calibration.py), by which queries and the output projection are multiplied; a
                 centre is subtracted from their biases, and that of the values is in the output projection's bias. With
                 a rotary embedding, which turns pairs of coordinates into each other, keys and queries are scaled and
                 centred in the graph (cache.py)
norms            the centre of each channel's range is subtracted from their outputs, and its product with each next
                 matrix is added to the bias; then they are divided by int8 scales, by which the matrices are multiplied
gated products   of an MLP: each channel is multiplied by a factor, by which the output projection is divided, so
                 that a channel of large values has small weights, and the reverse

Everything but the two ends of the residual stream is done to the weights, once. Source: Ashkboos et al., "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs" (https://arxiv.org/abs/2404.00456). QuaRot rotates all channels at once
and removes the mean in a layer norm; blocks of 64 are as accurate here, and keep the mean.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.export.hadamard import block_of, rotate
from chameleon_deploy.export.int8.calibration import (
    Statistics,
    centre_and_steps,
    key_centre_and_steps,
    value_centre_and_steps,
)
from chameleon_deploy.export.int8.layers import Linear, Norm, add_biases, layers_of
from chameleon_deploy.export.weights import page_out
from chameleon_deploy.reference.families.spec import DecoderSpec
from chameleon_deploy.reference.model import Trunk


@torch.no_grad()
def rotate_trunk(trunk: Trunk) -> Trunk:
    """Return a copy with the residual stream and the values rotated. It shares the token embedding and the head, which
    are as they were.
    """
    shared = {id(weight): weight for weight in (trunk.token_embedding, trunk.head_weight)}
    rotated = Trunk(copy.deepcopy(trunk.causal_lm, shared), trunk.tokenizer)
    for parameter in trunk.causal_lm.parameters():
        page_out(parameter)
    spec, head = trunk.spec, block_of(trunk.spec.head_dim)
    add_biases(rotated)
    for layer in layers_of(rotated):
        for norm, _, linears in layer.after_norms:
            _rotate_inputs(norm, linears)
        _rotate_outputs(layer.v, head)
        for linear, post_norm in zip((layer.o, layer.down), layer.post_norms, strict=True):
            if post_norm is None:
                _rotate_outputs(linear)
            else:
                post_norm.register_forward_hook(lambda module, inputs, output: rotate(output))
        layer.o.matrix = rotate(layer.o.matrix.T, head).T
    if spec.names.position_embedding:
        positions = rotated.causal_lm.get_submodule(spec.names.position_embedding).weight
        positions.copy_(rotate(positions))
    rotated.causal_lm.get_input_embeddings().register_forward_hook(lambda module, inputs, output: rotate(output))
    last_norm = rotated.causal_lm.get_submodule(spec.names.last_norm)
    last_norm.register_forward_pre_hook(lambda module, inputs: rotate(inputs[0]))
    return rotated


@torch.no_grad()
def balance_trunk(trunk: Trunk, statistics: Statistics) -> list[Tensor | None]:
    """Balance the channels of gated products, and change the statistics of the inputs that this changes. Returns the
    factors of every layer, [channels], or None for a layer without a gate. In SmolLM2-135M this divides the cost of
    rounding them by 1.2 to 140.
    """
    balances: list[Tensor | None] = []
    for layer in layers_of(trunk):
        if len(layer.ups) < 2:  # an activation function in between
            balances.append(None)
            continue
        squares = statistics.inputs[layer.names.down].squares()
        weights = layer.down.matrix.square().sum(1)
        factors = balance(squares, weights)
        _multiply_outputs(layer.ups[1], factors)
        layer.down.matrix = layer.down.matrix / factors[:, None]
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
def scale_trunk(trunk: Trunk, statistics: Statistics) -> None:
    """Centre and scale keys, values and norm outputs to the range of int8, -127 to 127, without rounding them, and
    change the statistics of the inputs that this changes.
    """
    spec, groups = trunk.spec, trunk.spec.num_attention_heads // trunk.spec.num_key_value_heads
    for i, (layer, seen, first) in enumerate(
        zip(layers_of(trunk), statistics.layers, statistics.first_tokens, strict=True)
    ):
        for (norm, name, linears), extremes in zip(layer.after_norms, (seen.norm_1, seen.norm_2), strict=True):
            if norm is None:
                continue
            centre, steps = centre_and_steps(extremes)
            if norm.bias is not None:
                _centre_norm(norm.bias, centre, linears)
            _scale_norm(norm, steps, linears)
            statistics.inputs[name].subtract(centre)
            statistics.inputs[name].divide(steps)
        if spec.scales_keys(i):
            centre, key = key_centre_and_steps(spec, seen, first)
            layer.k.bias = _required(layer.k.bias) - centre.flatten()
            _multiply_outputs(layer.q, key.repeat_interleave(groups, 0).flatten())
            _multiply_outputs(layer.k, 1 / key.flatten())
        centre, value = value_centre_and_steps(seen, first)
        layer.v.bias = _required(layer.v.bias) - centre.flatten()
        _multiply_outputs(layer.v, 1 / value.flatten())
        centres, values = (x.repeat_interleave(groups, 0).flatten() for x in (centre, value))
        layer.o.bias = _required(layer.o.bias) + centres @ layer.o.matrix
        layer.o.matrix = layer.o.matrix * values[:, None]
        statistics.inputs[layer.names.o].subtract(centres)
        statistics.inputs[layer.names.o].divide(values)


def turned_keys(spec: DecoderSpec, statistics: Statistics) -> list[tuple[FloatArray, FloatArray] | None]:
    """Return the centre, in steps, and the steps of every layer's keys, [key-value heads * head_dim] each; None where
    `scale_trunk` has taken them into the matrices.
    """
    turned: list[tuple[FloatArray, FloatArray] | None] = []
    for i, (seen, first) in enumerate(zip(statistics.layers, statistics.first_tokens, strict=True)):
        centre, steps = key_centre_and_steps(spec, seen, first)
        parts = (centre / steps).flatten().numpy(), steps.flatten().numpy()
        turned.append(None if spec.scales_keys(i) else parts)
    return turned


def _rotate_inputs(norm: Norm | None, linears: list[Linear]) -> None:
    """Let linear layers read rotated inputs, and fold the parameters of the norm before them into them."""
    if norm is not None and norm.bias is not None:
        _centre_norm(norm.bias, norm.bias.clone(), linears)
    for linear in linears:
        matrix = linear.matrix if norm is None else norm.weight[:, None] * linear.matrix
        linear.matrix = rotate(matrix.T).T
    if norm is not None:
        norm.weight = torch.ones_like(norm.weight)


def _rotate_outputs(linear: Linear, block: int | None = None) -> None:
    linear.matrix = rotate(linear.matrix, block)
    if linear.bias is not None:
        linear.bias = rotate(linear.bias, block)


def _centre_norm(bias: Tensor, centre: Tensor, linears: list[Linear]) -> None:
    """Subtract a vector from a norm's bias, and add its product with each next matrix to that layer's bias."""
    bias.sub_(centre)
    for linear in linears:
        linear.bias = _required(linear.bias) + centre @ linear.matrix


def _required(bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError("a layer has no bias to take a centre: see add_biases")
    return bias


def _scale_norm(norm: Norm, scale: Tensor, linears: list[Linear]) -> None:
    """Divide a norm's outputs by scales, and multiply the matrices that follow it."""
    norm.weight = norm.weight / scale
    if norm.bias is not None:
        norm.bias.div_(scale)
    for linear in linears:
        linear.matrix = linear.matrix * scale[:, None]


def _multiply_outputs(linear: Linear, factors: Tensor) -> None:
    linear.matrix = linear.matrix * factors
    if linear.bias is not None:
        linear.bias = linear.bias * factors
