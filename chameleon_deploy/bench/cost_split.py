"""Where the time of one generation goes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from chameleon_deploy.bench.timing import median_seconds
from chameleon_deploy.runtime import Runtime, Sampling
from chameleon_deploy.runtime.adaptation import assign, embed
from chameleon_deploy.runtime.backend import CpuBackend
from chameleon_deploy.runtime.sampling import TokenCounts, choose

ROUNDS = 5


def cost_split(runtime: Runtime, texts: list[str], num_tokens: int) -> dict[str, float]:
    """Seconds of the parts of `generate`, medians; graphs are timed inside it, the small parts alone.

    What is left of the whole, copies and bookkeeping, stands under "copies and the rest".
    """
    if not isinstance(runtime.backend, CpuBackend):
        raise TypeError(f"provider {runtime.provider} has no sessions to watch")
    seconds: dict[str, list[float]] = {role: [] for role in ("decoder", "hidden_scorer", "hypernetwork")}
    sessions = {role: _WatchedSession(session, seconds[role]) for role, session in runtime.backend.sessions.items()}
    watched = Runtime(runtime.bundle, CpuBackend(runtime.bundle, runtime.graph, sessions), runtime.mode)
    decoder, hypernetwork = seconds["decoder"], seconds["hypernetwork"]
    calls: list[list[float]] = []
    wholes, factors = [], []
    for _ in range(ROUNDS + 1):
        decoder.clear()
        hypernetwork.clear()
        start = time.perf_counter()
        generations = watched.generate(texts, max_new_tokens=num_tokens)
        wholes.append(time.perf_counter() - start)
        calls.append(list(decoder))
        factors.append(sum(hypernetwork))
    steps = max(len(generation.token_ids) for generation in generations) - 1
    prefills = len(calls[0]) - steps

    spec, model = runtime.manifest.adaptation, runtime.manifest.model
    table, centroids = runtime.bundle.token_embedding(), runtime.bundle.centroids()
    rows = [encoding.ids for encoding in runtime.tokenizer.encode_batch(texts, add_special_tokens=False)]
    logits, counts = np.zeros(model.vocab_size, np.float32), TokenCounts([0])
    choices = sum(len(generation.token_ids) for generation in generations)
    parts = {
        "tokenise": median_seconds(lambda: runtime.tokenizer.encode_batch(texts, add_special_tokens=False)),
        "embed and cluster": median_seconds(
            lambda: assign(embed(rows, table, spec, model.eos_token_id), centroids)
        ),
        "hypernetwork": statistics.median(factors[1:]),
        "decoder, prefill": statistics.median(sum(run[:prefills]) for run in calls[1:]),
        f"decoder, {steps} steps": statistics.median(sum(run[prefills:]) for run in calls[1:]),
        "sampling": choices * median_seconds(lambda: choose(logits, counts, Sampling(), 0.0)),
    }  # fmt: skip
    return parts | {"copies and the rest": statistics.median(wholes[1:]) - sum(parts.values())}


class _WatchedSession:
    """An ONNX Runtime session that also records the seconds of its calls."""

    def __init__(self, session: Any, seconds: list[float]) -> None:
        self._session, self._seconds = session, seconds

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if name not in ("run", "run_with_iobinding", "run_with_ort_values"):
            return found

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*arguments)
            finally:
                self._seconds.append(time.perf_counter() - start)

        return timed
