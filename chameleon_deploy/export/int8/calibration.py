"""Calibration: statistics of activations on sample text, in one pass over a rotated trunk.

They fix int8 scales at export; scales computed from a batch would let rows affect each other. They also tell GPTQ which
errors of weights cancel, and how to balance the channels of a gated activation. The text is a file of the user, or
prose of this package and Python's own documentation and code. Texts are long ones and the beginnings of others: the
first keys of a text are unlike others, and all tokens attend to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.errors import InputError
from chameleon_deploy.export.decoder import HEAD
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.hadamard import rotate
from chameleon_deploy.progress import Progress
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.texts import read_texts

TEXTS = slice(100, 106)  # of each kind of Python's text; `verify` uses the hundred before
LONG = 12, 512  # how many long texts, and the tokens of each
BEGINNINGS = 64, 32
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
class Products:
    """Sums over tokens of x^T x for the inputs x [tokens, n] of a matrix, in groups of 256 channels.

    groups  float32 [256, 256] each, fewer for the last
    """

    groups: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Add activations x [..., n]."""
        parts = x.flatten(0, -2).split(GROUP, -1)
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

    def rotated(self) -> list[Tensor]:
        """Return the groups of x H."""
        return [rotate(rotate(group).T.contiguous()) for group in self.groups]


@dataclass
class Statistics:
    """What calibration has seen.

    layers  the absmax of every layer, first to last
    head    the absmax of the rotated inputs of the head, [hidden]
    inputs  products of the inputs of each matrix, by the graph's name; those of an activation function and of the head
            before their rotation
    """

    layers: list[Absmax]
    head: Tensor
    inputs: dict[str, Products]


def calibrate(trunk: Trunk, model: ModelSpec, texts: Sequence[Tensor], report: Progress) -> Statistics:
    """Return the statistics of a rotated trunk over texts, int64 [texts, tokens] each."""
    from transformers import DynamicCache

    family = family_of(model.architecture)
    hidden, heads = (model.hidden_size,), (model.num_key_value_heads, model.head_dim)
    layers = [Absmax(*(_unseen(shape) for shape in (hidden, hidden, heads, heads))) for _ in range(model.num_layers)]
    seen, hooks = Statistics(layers, _unseen(hidden), {}), []

    def see(name: str, x: Tensor, absmax: Tensor | None) -> None:
        seen.inputs.setdefault(name, Products()).add(x)
        if absmax is not None:
            _update(absmax, rotate(x) if name == HEAD else x)

    for layer, absmax in zip(family.layers(trunk), layers, strict=True):
        fixed = absmax.norm_1, None, absmax.norm_2, None
        for name, module, scale in zip(layer.names, layer.readers, fixed, strict=True):
            before = lambda module, inputs, name=name, scale=scale: see(name, inputs[0], scale)  # noqa: E731
            hooks.append(module.register_forward_pre_hook(before))
    last_norm = family.last_norm_of(trunk)
    hooks.append(last_norm.register_forward_hook(lambda module, inputs, output: see(HEAD, output, seen.head)))
    for done, rows in enumerate(texts):
        report("calibrate", done, len(texts))
        _, cache = trunk.hidden_states(rows, past_key_values=DynamicCache())
        for absmax, (key, value, *_) in zip(layers, cache, strict=True):
            _update(absmax.keys, key)
            _update(absmax.values, value)
    report("calibrate", len(texts), len(texts))
    for hook in hooks:
        hook.remove()
    return seen


def _unseen(shape: tuple[int, ...]) -> Tensor:
    """A channel that is never used has an absmax close to zero."""
    return torch.full(shape, 1e-6)


def _update(absmax: Tensor, x: Tensor) -> None:
    """Update absmax with x [texts, tokens, hidden] or [texts, key-value heads, tokens, head_dim]."""
    torch.maximum(absmax, x.abs().amax((0, -2)) * MARGIN, out=absmax)


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
    return [*(torch.from_numpy(stream[None, start : start + length]) for start in starts), torch.tensor(begun)]


def _own_texts() -> list[str]:
    """Return prose and Python's texts, the kinds in turn."""
    prose = (resources.files(__package__) / "prose.txt").read_text("utf-8").split("\n\n")
    kinds: list[Any] = [prose, *(python_texts(kind)[TEXTS] for kind in KINDS)]
    return [text for group in itertools.zip_longest(*kinds) for text in group if text]
