"""The bundle as users run it, and two ablations: one call per cluster, and full logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.bench.peers import ADAPT, DECODE, PREFILL, Rows
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.runtime import Runtime, Sampling
from chameleon_deploy.runtime.engine.loop import generate_rows
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.runtime.generation import Row
from chameleon_deploy.runtime.sampling import Sampler


class Bundle:
    """The bundle, with rows of all clusters or adapters in one call. See `Peer`.

    wait      returns when the device has finished its queue: laps end then
    adapters  of the rows of `generate`, in a bundle that has adapters
    """

    scores = generates = True
    is_ablation = False

    def __init__(
        self,
        runtime: Runtime,
        name: str = "bundle",
        wait: Callable[[], None] = lambda: None,
        adapters: Sequence[str | None] | None = None,
    ) -> None:
        self.name, self._wait, self._adapters = name, wait, adapters
        self.adapts = runtime.mode != "none" or adapters is not None
        self.precision: str = runtime.manifest.precision
        self.size = sum(file.size for file in runtime.manifest.files.values())
        self._runtime = runtime

    def logits(self, ids: Sequence[int]) -> Any:
        factors = self._runtime.adapt([ids], mode="none", on_device=True).factors
        pieces = self._runtime.decoder.all_logits([ids], factors)
        return np.concatenate([np.array(piece)[0] for _, piece in pieces])

    def score(self, rows: Rows) -> Any:
        return np.array([score.token_logprobs for score in self._runtime.score(rows)])

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        return self.generate_with(rows, self._adapt(rows, lap), num_tokens, lap)

    def _adapt(self, rows: Rows, lap: Lap) -> RowFactors:
        factors = self._runtime.adapt(rows, adapters=self._adapters, on_device=True).factors
        self._wait()
        lap(ADAPT)
        return factors

    def generate_with(self, rows: Rows, factors: RowFactors, num_tokens: int, lap: Lap) -> Any:
        """Generate with given factors, as `Runtime.stream` does, but no token ends a row: all have the same length."""
        active = [Row(i, ids, num_tokens, Sampler(Sampling(), ids, i), -1) for i, ids in enumerate(rows)]
        tokens = generate_rows(active, factors, self._runtime.backend, self._runtime.tokenizer, eos_token_id=-1)
        for _ in rows:
            next(tokens)
        lap(PREFILL)
        for _ in tokens:
            pass
        lap(DECODE)
        return np.array([row.token_ids for row in active])


class OneCallPerSet(Bundle):
    """One call for the rows of each factor set: of a cluster, as in the paper, or of an adapter. See `Peer`."""

    scores = False
    is_ablation = True

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        factors = self._adapt(rows, lap)
        chosen = np.empty((len(rows), num_tokens), np.int64)
        for i in range(len(factors.sets)):
            members = np.flatnonzero(factors.factor_ids == i)
            own = RowFactors(factors.sets[np.array([i])], np.zeros(len(members), np.int64))
            chosen[members] = self.generate_with([rows[int(row)] for row in members], own, num_tokens, lap)
        return chosen


class FullLogits(Bundle):
    """Scoring with the logits of all positions in memory at once and their softmax in numpy. See `Peer`."""

    generates = False
    is_ablation = True

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime, "full logits")

    def score(self, rows: Rows) -> Any:
        pieces = self._runtime.decoder.all_logits([ids[:-1] for ids in rows], self._adapt(rows, lambda lap: None))
        # The pieces of a single row share memory; for several rows a copy would distort the timing.
        logits, *others = (np.array(piece) if len(rows) == 1 else np.asarray(piece) for _, piece in pieces)
        if others:
            logits = np.concatenate([logits, *others], axis=1)
        chosen = np.take_along_axis(logits, np.array(rows)[:, 1:, None], 2)[..., 0]
        highest = logits.max(2)
        logits -= highest[..., None]
        return chosen - highest - np.log(np.exp(logits, out=logits).sum(2))
