"""Calibration: the absmax of each activation channel on sample text.

It fixes int8 scales at export; scales computed from a batch would let rows affect each other. The sample has texts as
long as the model's positions allow and the beginnings of others, from Python's own documentation and from tokens drawn
from the whole vocabulary, since a user's texts may be of any kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.export.decoder import HEAD
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.int8.hadamard import rotate
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.python_corpus import KINDS, python_texts

TEXTS = slice(100, 200)  # of each kind; `verify` uses the hundred before
LONG = 16, 4, 1024  # texts of the documentation, of drawn tokens, and how many tokens each has
BEGINNINGS = 64, 32  # texts of each, tokens: the first keys of a text are unlike others, and all tokens attend to them
MARGIN = 1.1  # over the observed absmax
INT8_MAX = 127  # the largest int8 value; -128 is not used
GROUP = 256  # channels whose products with each other are stored


@dataclass
class Absmax:
    """The absmax of each channel of a layer, including the margin.

    norm_1, norm_2  of the norms' outputs, [hidden]
    keys, values    [key-value heads, head_dim]
    """

    norm_1: Tensor
    norm_2: Tensor
    keys: Tensor
    values: Tensor


@dataclass
class Activations:
    """Statistics of the input of a matrix with n channels.

    rotated   whether the graph rotates it: the outputs of an activation function or of the last norm
    absmax    float32 [n], including the margin
    products  float32 [256, 256] for each 256 channels, fewer for the last: the sum over tokens of x^T x
    """

    rotated: bool
    absmax: Tensor
    products: list[Tensor]

    @staticmethod
    def of(channels: int, rotated: bool) -> Activations:
        sizes = [len(part) for part in torch.empty(channels).split(GROUP)]
        return Activations(rotated, torch.full((channels,), 1e-6), [torch.zeros(size, size) for size in sizes])

    def add(self, x: Tensor) -> None:
        """Add activations x [..., n], before the rotation."""
        x = (rotate(x) if self.rotated else x).flatten(0, -2)
        torch.maximum(self.absmax, x.abs().amax(0) * MARGIN, out=self.absmax)
        for product, part in zip(self.products, x.split(GROUP, -1), strict=True):
            product.addmm_(part.T, part)

    def divided(self, by: Tensor) -> Activations:
        """Return the statistics of activations divided by `by`, float32 [n]."""
        parts = zip(self.products, by.split(GROUP), strict=True)
        return Activations(self.rotated, self.absmax / by, [product / part / part[:, None] for product, part in parts])


def absmax_of_layers(trunk: Trunk, model: ModelSpec) -> list[Absmax]:
    """Return the absmax of every layer, first to last."""
    from transformers import DynamicCache

    hidden, heads = (model.hidden_size,), (model.num_key_value_heads, model.head_dim)
    shapes = hidden, hidden, heads, heads
    # A channel that is never used has an absmax close to zero.
    layers = [Absmax(*(torch.full(shape, 1e-6) for shape in shapes)) for _ in range(model.num_layers)]

    def update(absmax: Tensor, x: Tensor) -> None:
        """Update absmax with x [texts, tokens, hidden] or [texts, key-value heads, tokens, head_dim]."""
        torch.maximum(absmax, x.abs().amax((0, -2)) * MARGIN, out=absmax)

    hooks = [
        norm.register_forward_hook(lambda module, inputs, output, absmax=absmax: update(absmax, output))
        for layer, seen in zip(family_of(model.architecture).layers(trunk), layers, strict=True)
        for norm, absmax in ((layer.norm_1, seen.norm_1), (layer.norm_2, seen.norm_2))
    ]
    for rows in _texts(trunk):
        _, cache = trunk.hidden_states(rows, past_key_values=DynamicCache())
        for seen, (key, value, *_) in zip(layers, cache, strict=True):
            update(seen.keys, key)
            update(seen.values, value)
    _remove(hooks)
    return layers


def activations_of(trunk: Trunk, model: ModelSpec) -> dict[str, Activations]:
    """Return the statistics by the graph's name of a matrix."""
    family, seen = family_of(model.architecture), dict[str, Activations]()

    def see(name: str, x: Tensor, rotated: bool) -> None:
        seen.setdefault(name, Activations.of(x.shape[-1], rotated)).add(x)

    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name, rotated=name == layer.names.down: see(name, inputs[0], rotated)
        )
        for layer in family.layers(trunk)
        for name, module in zip(layer.names, layer.readers, strict=True)
    ]
    last_norm = family.last_norm_of(trunk)
    hooks.append(last_norm.register_forward_hook(lambda module, inputs, output: see(HEAD, output, True)))
    for rows in _texts(trunk):
        trunk.hidden_states(rows)
    _remove(hooks)
    return seen


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _texts(trunk: Trunk) -> Iterator[Tensor]:
    """Yield int64 [texts, tokens]: long texts one by one, whose keys and values are large, and beginnings; real and
    drawn.
    """
    long, long_drawn, longest = LONG
    count, width = BEGINNINGS
    width = min(width, trunk.max_positions)
    texts = [t for group in zip(*(python_texts(kind)[TEXTS] for kind in KINDS), strict=False) for t in group]
    encoded = [e.ids for e in trunk.tokenizer.encode_batch(texts, add_special_tokens=False)]
    read = np.array(list(itertools.chain.from_iterable(encoded)))
    begun = np.array([ids[:width] for ids in encoded if len(ids) >= width][:count])
    length = min(trunk.max_positions, longest, read.size)
    long = min(long, read.size // length)
    drawn = np.random.default_rng(0).integers(0, trunk.config.vocab_size, (long_drawn, 1, length))
    drawn_begun = np.random.default_rng(1).integers(0, trunk.config.vocab_size, begun.shape)
    for rows in (*read[: long * length].reshape(long, 1, length), *drawn, begun, drawn_begun):
        yield torch.from_numpy(rows)
