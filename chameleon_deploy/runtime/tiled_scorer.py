"""Log-probabilities from hidden states, by a scorer whose logits never exist at once (export/tiled_scorer.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.bundle import FloatArray
from chameleon_deploy.runtime.adaptation import Adaptation

# Of one call: fewer read the head's weights more often, of more a tile's logits leave the processor's cache.
POSITIONS = 512


class TiledScorer:
    """Positions of all rows go through the head together, as many as a call takes.

    session  of scorer_cpu.onnx
    """

    def __init__(self, session: Any, hidden_size: int) -> None:
        self.session, self._hidden_size = session, hidden_size

    def logprobs(
        self,
        rows: Sequence[Sequence[int]],
        hidden_states: Iterable[tuple[int, int, FloatArray]],
        adaptation: Adaptation,
    ) -> list[FloatArray]:
        """Of every row the log-probability of each token after the first.

        hidden_states  of every position but the last of every row: (row, first position, float32 [n, hidden])
        """
        logprobs = [np.empty(len(ids) - 1, np.float32) for ids in rows]
        waiting = np.empty((POSITIONS, self._hidden_size), np.float32)
        places: list[tuple[int, int, int]] = []  # what waits: row, first position, how many
        count = 0

        def score() -> None:
            nonlocal count
            targets = [rows[row][start + 1 : start + 1 + n] for row, start, n in places]
            cluster_ids = np.repeat(adaptation.factor_ids[[row for row, *_ in places]], [n for *_, n in places])
            inputs = {
                "hidden_states": waiting[:count],
                "targets": np.concatenate([np.asarray(ids, np.int64) for ids in targets]),
                "cluster_ids": cluster_ids,
                "lora_A": adaptation.lora_A,
                "lora_B": adaptation.lora_B,
            }
            (found,) = self.session.run(["logprobs"], inputs)
            ends = np.cumsum([n for *_, n in places])[:-1]
            for (row, start, n), values in zip(places, np.split(found, ends), strict=True):
                logprobs[row][start : start + n] = values
            places.clear()
            count = 0

        for row, start, states in hidden_states:
            while len(states):
                n = min(len(states), POSITIONS - count)
                waiting[count : count + n] = states[:n]
                places.append((row, start, n))
                count, start, states = count + n, start + n, states[n:]
                if count == POSITIONS:
                    score()
        if count:
            score()
        return logprobs
