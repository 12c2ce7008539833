"""How large keys and values become, which fixes the scales of a cache in 8 bits (passes/int8_cache.py)."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from chameleon_deploy.bundle import FloatArray
from chameleon_deploy.export.passes.int8_weights import block_of, rotate
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.python_corpus import KINDS, python_texts

TEXTS = slice(100, 200)  # of each kind; `verify` judges on the hundred before
LONGEST = 1024  # tokens of the one long text
BEGINNINGS = 64, 32  # texts, tokens: the first keys of a text are like no others, and all tokens look at them
MARGIN = 1.25  # over the highest that was seen


def highest_keys_and_values(trunk: Trunk) -> FloatArray:
    """float32 [layers, 2, key-value heads, head_dim]: the highest absolute key and value of each channel, and a margin.
    Values are rotated first, as int8_weights.py stores them.

    Seen in a text as long as the model's positions allow and in the beginnings of 64 others, once of Python's own
    documentation and once of tokens drawn from the whole vocabulary: a user's texts may be of any kind.
    """
    from transformers import DynamicCache

    count, width = BEGINNINGS
    width = min(width, trunk.max_positions)
    texts = [t for group in zip(*(python_texts(kind)[TEXTS] for kind in KINDS), strict=False) for t in group]
    encoded = [e.ids for e in trunk.tokenizer.encode_batch(texts, add_special_tokens=False)]
    read = np.array(list(itertools.chain.from_iterable(encoded)))
    begun = np.array([ids[:width] for ids in encoded if len(ids) >= width][:count])
    drawn = np.random.default_rng(0).integers(0, trunk.config.vocab_size, read.size)
    length = min(trunk.max_positions, LONGEST, read.size)
    highest = []
    for rows in (read[None, :length], drawn[None, :length], begun, drawn[: begun.size].reshape(begun.shape)):
        _, cache = trunk.hidden_states(torch.from_numpy(rows), past_key_values=DynamicCache())
        highest.append([[_highest(key.numpy()), _highest(rotate(value.numpy(), block_of(value.shape[-1])))]
                        for key, value, *_ in cache])  # fmt: skip
    largest = np.array(highest, np.float32).max(0) * np.float32(MARGIN)
    usable: FloatArray = np.maximum(largest, np.float32(1e-6))  # a channel that is never used is zero
    return usable


def _highest(x: FloatArray) -> FloatArray:
    """[texts, heads, tokens, head_dim] -> [heads, head_dim]"""
    highest: FloatArray = np.abs(x).max((0, 2))
    return highest
