"""Calibration: statistics of activations on sample text, in one pass over a rotated trunk.

They fix int8 scales at export; scales computed from a batch would let rows affect each other. They also tell GPTQ which
errors of weights cancel, and how to balance the channels of a gated activation. The text is a file of the user, or
prose of this package and Python's own documentation and code. Texts are long ones and the beginnings of others: the
first keys of a text are unlike others, and all tokens attend to them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import HEAD
from chameleon_deploy.errors import InputError
from chameleon_deploy.export.hadamard import rotate
from chameleon_deploy.export.int8.layers import layers_of
from chameleon_deploy.export.trunk import rotary_angles
from chameleon_deploy.reference.corpus import prefix_ids
from chameleon_deploy.reference.families.spec import DecoderSpec
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.texts import read_texts

TEXTS = slice(100, 106)  # of each kind of Python's text; `verify` uses the hundred before
LONG = 12, 512  # how many long texts, and the tokens of each
BEGINNINGS = 64, 32
MARGIN = 1.1  # over the observed range of a norm's outputs; of values, coarser steps cost more than saturation
KEY_MARGIN = 1.15  # saturation of keys raises the perplexity by more than the KL divergence
INT8_MAX = 127  # the largest int8 value; -128 is not used
SMALLEST_STEP = 1e-8  # of a channel that is never used
GROUP = 768  # channels whose products with each other are stored


@dataclass
class Extremes:
    """The extreme values of each channel of a layer.

    norm_1, norm_2  of the norms' outputs, [2, hidden]: the largest of x and of -x
    keys            the same, [2, key-value heads, head_dim], as they are cached; with a rotary embedding at whatever
                    position a key stands
    values          absmax, [key-value heads, head_dim]
    """

    norm_1: Tensor
    norm_2: Tensor
    keys: Tensor
    values: Tensor


@dataclass
class FirstToken:
    """The key and the value of a text's first token in a layer, [key-value heads, head_dim] each: medians over texts.

    All tokens attend to it, often with most of their weight, and in most layers it is nearly the same whatever the
    token is. So the error of rounding it is one of all tokens (docs/lab/int8.md).
    """

    key: Tensor
    value: Tensor


@dataclass
class Products:
    """Sums over tokens of x^T x for the inputs x [tokens, n] of a matrix, in groups of 768 channels.

    groups  float32 [768, 768] each, fewer for the last
    total   the sum of x, float32 [n]
    tokens  how many
    """

    groups: list[Tensor] = field(default_factory=list)
    total: Tensor = field(default_factory=lambda: torch.zeros(1))
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Add activations x [..., n]."""
        rows = x.flatten(0, -2)
        parts = rows.split(GROUP, -1)
        self.total = self.total + rows.sum(0)
        self.tokens += len(rows)
        self.groups = self.groups or [torch.zeros(part.shape[1], part.shape[1]) for part in parts]
        for group, part in zip(self.groups, parts, strict=True):
            group.addmm_(part.T, part)

    def squares(self) -> Tensor:
        """Return the sum of squares of each channel, float32 [n]."""
        return torch.cat([group.diagonal() for group in self.groups])

    def divide(self, by: Tensor) -> None:
        """Change them to those of x / by, float32 [n]."""
        for group, part in zip(self.groups, by.split(GROUP), strict=True):
            group.div_(part).div_(part[:, None])
        self.total = self.total / by

    def subtract(self, centre: Tensor) -> None:
        """Change them to those of x - centre, float32 [n]."""
        parts = zip(self.groups, self.total.split(GROUP), centre.split(GROUP), strict=True)
        for group, total, part in parts:
            group.addr_(part, total, alpha=-1).addr_(total - self.tokens * part, part, alpha=-1)
        self.total = self.total - self.tokens * centre

    def rotated(self) -> Products:
        """Return those of x H."""
        groups = [rotate(rotate(group).T.contiguous()) for group in self.groups]
        return Products(groups, rotate(self.total), self.tokens)


@dataclass
class Statistics:
    """Statistics of the activations that calibration has seen.

    layers        the extremes of every layer, first to last
    first_tokens  of every layer
    inputs        products of the inputs of each matrix, by the graph's name; those of an activation function and of the
                  head before their rotation
    """

    layers: list[Extremes]
    first_tokens: list[FirstToken]
    inputs: dict[str, Products]


@torch.no_grad()
def calibrate(trunk: Trunk, texts: Sequence[Tensor], report: Progress) -> Statistics:
    """Return the statistics of a rotated trunk over texts, int64 [texts, tokens] each."""
    from transformers import DynamicCache

    spec = trunk.spec
    hidden, heads = (2, spec.hidden_size), (spec.num_key_value_heads, spec.head_dim)
    # The matrices after norms that have a bias, from which a centre can be subtracted.
    centred = {
        name for layer in layers_of(trunk) for norm, name, _ in layer.after_norms if norm and norm.bias is not None
    }
    shapes = hidden, hidden, (2, *heads), heads
    layers = [Extremes(*map(_unseen, shapes)) for _ in range(spec.num_layers)]
    kinds = {layer.rotary for layer in spec.layers}
    angles = {kind: torch.from_numpy(rotary_angles(trunk, kind)) for kind in kinds if kind is not None}
    seen, hooks = Statistics(layers, [], {}), []
    firsts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    def see(name: str, x: Tensor, extremes: Tensor | None = None) -> None:
        seen.inputs.setdefault(name, Products()).add(x)
        if extremes is not None:
            _update(extremes, torch.stack([x, -x]) if name in centred else x.abs()[None])

    for layer, extremes in zip(layers_of(trunk), layers, strict=True):
        fixed = extremes.norm_1, None, extremes.norm_2, None
        for name, module, taken in zip(layer.names, layer.readers, fixed, strict=True):
            before = lambda module, inputs, name=name, taken=taken: see(name, inputs[0], taken)  # noqa: E731
            hooks.append(module.register_forward_pre_hook(before))
    last_norm = trunk.causal_lm.get_submodule(spec.names.last_norm)
    hooks.append(last_norm.register_forward_hook(lambda module, inputs, output: see(HEAD, output)))
    for done, rows in enumerate(texts):
        report("calibrate", done, len(texts))
        _, cache = trunk.hidden_states(rows, past_key_values=DynamicCache())
        for extremes, first, switches, (key, value, *_) in zip(layers, firsts, spec.layers, cache, strict=True):
            turns = angles[switches.rotary] if switches.rotary else None
            _update(extremes.keys, _both_sides(key, turns).transpose(1, 2))
            _update(extremes.values, value.abs().transpose(0, 1))
            first.append((key[:, :, 0], value[:, :, 0]))
    report("calibrate", len(texts), len(texts))
    for hook in hooks:
        hook.remove()
    for first in firsts:
        keys, values = (torch.cat(parts).median(0).values for parts in zip(*first, strict=True))
        seen.first_tokens.append(FirstToken(keys, values))
    return seen


def _unseen(shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, -torch.inf)


def _update(extremes: Tensor, x: Tensor) -> None:
    """Update extremes [..., channels] with x [..., texts, tokens, channels]."""
    torch.maximum(extremes, x.amax((-3, -2)), out=extremes)


def _both_sides(keys: Tensor, angles: Tensor | None) -> Tensor:
    """Return the largest values that coordinates of keys [..., tokens, head_dim] and of their negatives take at any
    position, [2, ..., tokens, head_dim].

    angles  see `rotary_angles`; None without a rotary embedding. Slow pairs of coordinates do not reach a full turn at
            the last position, so that a constant part of all keys stays on one side.
    """
    if angles is None:
        return torch.stack([keys, -keys])
    half = angles.shape[-1]
    x, y, still = keys.split([half, half, keys.shape[-1] - 2 * half], -1)
    radius, start, turn = torch.hypot(x, y), torch.atan2(y, x) - angles[: keys.shape[-2]], angles[-1]

    def largest(axis: float) -> Tensor:
        """Return the largest radius * cos(angle - axis) over all angles from start to start + turn."""
        first = start - axis
        reached = torch.remainder(-first, 2 * math.pi) <= turn
        return radius * torch.where(reached, 1.0, torch.maximum(first.cos(), (first + turn).cos()))

    quarters = [largest(quarter * math.pi / 2) for quarter in range(4)]  # x, y, -x, -y
    return torch.stack([torch.cat([*quarters[:2], still], -1), torch.cat([*quarters[2:], -still], -1)])


def steps_of(absmax: Tensor) -> Tensor:
    """Return the steps of int8 values from zero to either side."""
    return (absmax / INT8_MAX).clamp_min(SMALLEST_STEP)


def centre_and_steps(extremes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre of each channel of a norm's outputs, and the steps of int8 values around it, [hidden] each.

    extremes  [2, hidden], see `Extremes`
    """
    high, low = extremes
    return (high - low) / 2, steps_of((high + low) / 2 * MARGIN)


def key_centre_and_steps(spec: DecoderSpec, seen: Extremes, first: FirstToken) -> tuple[Tensor, Tensor]:
    """Return the centre of each coordinate of the keys as they are cached, and the steps of int8 values around it,
    [key-value heads, head_dim] each. The first token's key is a whole number of steps from it.

    A vector that is subtracted from all keys of a head changes the scores of a query by the same number, and no weight
    of the softmax; where scores are capped it would, and the centre is zero.
    """
    high, low = seen.keys
    if spec.attention_cap is not None:
        return torch.zeros_like(high), steps_of(torch.maximum(high, low) * KEY_MARGIN)
    steps = key_steps(seen)
    return _whole_steps_from(first.key, (high - low) / 2, steps), steps


def key_steps(seen: Extremes) -> Tensor:
    """Return the steps of `key_centre_and_steps`."""
    return steps_of(seen.keys.sum(0) / 2 * KEY_MARGIN)


def value_centre_and_steps(seen: Extremes, first: FirstToken) -> tuple[Tensor, Tensor]:
    """Return the centre of each channel of the values, at most half a step, and the steps of int8 values around it,
    [key-value heads, head_dim] each. The first token's value is a whole number of steps from it.

    The weights of a softmax sum to one: a vector that is subtracted from all values is missing from their mean.
    """
    steps = steps_of(seen.values)
    return _whole_steps_from(first.value, torch.zeros_like(steps), steps), steps


def _whole_steps_from(point: Tensor, centre: Tensor, steps: Tensor) -> Tensor:
    """Return the centre moved by at most half a step, to a whole number of steps from a point."""
    return point - ((point - centre) / steps).round() * steps


def calibration_texts(trunk: Trunk, files: Sequence[Path] | None) -> list[Tensor]:
    """Return int64 [texts, tokens]: long texts one by one, and the beginnings of texts.

    files  text of the user; None takes that of this package and of Python

    Raises InputError if the files have fewer tokens than two long texts.
    """
    texts = read_texts(list(files)) if files else _own_texts()
    encoded = [e.ids for e in trunk.tokenizer.encode_batch(texts, add_special_tokens=False)]
    stream = np.array(list(itertools.chain.from_iterable(encoded)))
    count, longest = LONG
    length = min(trunk.max_positions, longest)
    if len(stream) < 2 * length:
        raise InputError(f"calibration needs at least {2 * length} tokens of text, got {len(stream)}: pass more text")
    starts = np.linspace(0, len(stream) - length, min(count, len(stream) // length)).astype(int)
    first, width = BEGINNINGS
    width = min(width, trunk.max_positions)
    begun = [ids[:width] for ids in encoded if len(ids) >= width][:first]
    begun = begun or [stream[:width].tolist()]
    before = prefix_ids(trunk.tokenizer)
    long = [[*before, *stream[start : start + length].tolist()][:length] for start in starts]
    return [*(torch.tensor([ids]) for ids in long), torch.tensor([[*before, *ids][:width] for ids in begun])]


def _own_texts() -> list[str]:
    """Return prose and Python's texts, the kinds in turn."""
    prose = (resources.files(__package__) / "prose.txt").read_text("utf-8").split("\n\n")
    kinds: list[Any] = [prose, *(python_texts(kind, TEXTS.stop)[TEXTS] for kind in KINDS)]
    return [text for group in itertools.zip_longest(*kinds) for text in group if text]
