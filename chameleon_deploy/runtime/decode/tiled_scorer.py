"""Log-probabilities from hidden states, by a scorer that never forms all logits (export/tiled_scorer.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.runtime.decode.session import run
from chameleon_deploy.runtime.factors import FactorSets, RowFactors

# Positions per call: smaller re-reads the head weights more often, larger evicts a tile's logits from the cache.
POSITIONS = 512

Piece = tuple[int, int, FloatArray]  # a row, the first of some of its positions, their hidden states [n, hidden]


class TiledScorer:
    """Batches positions of all rows into calls of the head.

    session  of hidden_scorer.onnx
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self._names = {node.name for node in session.get_inputs()}  # without factors if the head is no target

    def logprobs(self, rows: Sequence[Sequence[int]], pieces: Iterable[Piece], factors: RowFactors) -> list[FloatArray]:
        """Return for each row the log-probability of each token after the first, float32 [length - 1].

        pieces  every position of every row except its last, in any pieces that end where the row's update begins
        """
        logprobs = [np.empty(len(ids) - 1, np.float32) for ids in rows]
        tensors = {name: array for name, array in factors.sets.tensors.items() if name in self._names}
        factors = replace(factors, sets=FactorSets(tensors))
        for call in _calls(pieces):
            counts = [len(states) for _, _, states in call]
            targets = [rows[row][start + 1 : start + 1 + n] for (row, start, _), n in zip(call, counts, strict=True)]
            own = factors.at([row for row, _, _ in call], [start for _, start, _ in call])
            inputs = {
                "hidden_states": np.concatenate([states for _, _, states in call]),
                "targets": np.concatenate([np.asarray(ids, np.int64) for ids in targets]),
                "factor_ids": np.repeat(own.factor_ids, counts),
                **own.sets.tensors,
            }
            inputs = {name: array for name, array in inputs.items() if name in self._names}
            (found,) = run(self.session.run, ["logprobs"], inputs)
            for (row, start, _), values in zip(call, np.split(found, np.cumsum(counts)[:-1]), strict=True):
                logprobs[row][start : start + len(values)] = values
        return logprobs


def _calls(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield groups of POSITIONS positions, splitting pieces as needed; the last group may be smaller."""
    call: list[Piece] = []
    room = POSITIONS
    for row, start, states in pieces:
        while len(states):
            part = states[:room]
            call.append((row, start, part))
            start, states, room = start + len(part), states[len(part) :], room - len(part)
            if not room:
                yield call
                call, room = [], POSITIONS
    if call:
        yield call
