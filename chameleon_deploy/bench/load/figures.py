"""The figures of one run under load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chameleon_deploy.bench.load.traffic import Record, Steps


@dataclass(frozen=True)
class Latency:
    """Percentiles in seconds, interpolated linearly between the two nearest values."""

    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Latency | None:
        """Return the percentiles; None for no values."""
        return Latency(*map(float, np.percentile(seconds, (50, 90, 99)))) if seconds else None


@dataclass(frozen=True)
class Figures:
    """What one run measured. Failed requests count in `failed` and `errors`, and in no latency and no rate.

    seconds            from the first request to the last end
    tokens_per_second  new tokens
    first_token        from when a request was due to its first token
    inter_token        between two pieces of text of a request
    end_to_end         from when a request was due to its end
    in_flight          requests that were due and had not ended, on average
    rows_per_step      of the decoder, on average; None where the target does not tell
    decoder_idle       seconds per step in which the decoder did not run, likewise: the engine's own work and the load
                       program's in a closed loop, and also the waiting for requests under Poisson arrivals
    errors             how many requests failed for each reason
    """

    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    first_token: Latency | None
    inter_token: Latency | None
    end_to_end: Latency | None
    in_flight: float
    rows_per_step: float | None
    decoder_idle: float | None
    errors: dict[str, int]


def summarize(records: Sequence[Record], steps: Steps | None) -> Figures:
    done = [record for record in records if not record.error]
    seconds = max(record.ended for record in records) - min(record.due for record in records)
    return Figures(
        requests=len(records),
        failed=len(records) - len(done),
        seconds=seconds,
        requests_per_second=len(done) / seconds,
        tokens_per_second=sum(record.new_tokens for record in done) / seconds,
        first_token=Latency.of(first_token_seconds(done)),
        inter_token=Latency.of(inter_token_seconds(done)),
        end_to_end=Latency.of(end_to_end_seconds(done)),
        in_flight=sum(end_to_end_seconds(records)) / seconds,
        rows_per_step=steps.rows / steps.count if steps and steps.count else None,
        decoder_idle=(seconds - steps.seconds) / steps.count if steps and steps.seconds and steps.count else None,
        errors=dict(Counter(record.error for record in records if record.error)),
    )


def first_token_seconds(records: Sequence[Record]) -> list[float]:
    return [record.arrivals[0] - record.due for record in records]


def inter_token_seconds(records: Sequence[Record]) -> list[float]:
    return [gap for record in records for gap in np.diff(record.arrivals).tolist()]


def end_to_end_seconds(records: Sequence[Record]) -> list[float]:
    return [record.ended - record.due for record in records]
