"""A baseline that a language model must beat."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def bigram_perplexity(train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocab_size: int) -> float:
    """Perplexity of bigram counts interpolated with unigrams (Witten and Bell, 1991)."""
    unigrams = np.bincount(np.concatenate([np.asarray(ids) for ids in train]), minlength=vocab_size) + 1.0
    unigrams /= unigrams.sum()
    bigrams: npt.NDArray[np.float64] = np.zeros((vocab_size, vocab_size))
    for ids in train:
        np.add.at(bigrams, (ids[:-1], ids[1:]), 1.0)
    nll, count = 0.0, 0
    for ids in held_out:
        before, after = np.asarray(ids[:-1]), np.asarray(ids[1:])
        totals = bigrams[before].sum(1)
        # As much weight for the unseen as the context has different continuations.
        kinds = (bigrams[before] > 0).sum(1) + 1.0
        probability = (bigrams[before, after] + kinds * unigrams[after]) / (totals + kinds)
        nll, count = nll - float(np.log(probability).sum()), count + len(after)
    return math.exp(nll / count)
