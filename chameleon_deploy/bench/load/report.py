"""The figures of runs under load: tables, and a page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chameleon_deploy.bench.load.figures import (
    Figures,
    Latency,
    end_to_end_seconds,
    first_token_seconds,
    inter_token_seconds,
)
from chameleon_deploy.bench.load.traffic import Record
from chameleon_deploy.terminal.html_page import Page
from chameleon_deploy.terminal.table import Sheet


def latency_sheet(figures: Figures) -> Sheet:
    rows = [
        ["time to first token", *_milliseconds(figures.first_token)],
        ["between tokens", *_milliseconds(figures.inter_token)],
        ["end to end", *_milliseconds(figures.end_to_end)],
    ]
    return Sheet(["milliseconds", "p50", "p90", "p99"], rows)


def rate_sheet(figures: Figures) -> Sheet:
    rows_per_step = "" if figures.rows_per_step is None else f"{figures.rows_per_step:.2f}"
    idle = "" if figures.decoder_idle is None else f"{figures.decoder_idle * 1e3:.2f}"
    row = [
        str(figures.requests), str(figures.failed), f"{figures.seconds:.2f}", f"{figures.requests_per_second:.2f}",
        f"{figures.tokens_per_second:.1f}", f"{figures.in_flight:.1f}", rows_per_step, idle,
    ]  # fmt: skip
    headers = ["requests", "failed", "seconds", "requests/s", "tokens/s", "in flight", "rows per step",
               "decoder idle, ms per step"]  # fmt: skip
    return Sheet(headers, [row])


def error_sheet(figures: Figures) -> Sheet:
    return Sheet(["failed", "why"], [[str(count), reason] for reason, count in figures.errors.items()])


def sheets(figures: Figures) -> list[Sheet]:
    return [rate_sheet(figures), latency_sheet(figures), *([error_sheet(figures)] if figures.failed else [])]


def fill(page: Page, figures: Figures, records: Sequence[Record]) -> None:
    """Fill the page: tables, the distributions of the latencies, and the requests in flight over time."""
    page.section("Figures")
    for sheet in sheets(figures):
        page.table(sheet)
    done = [record for record in records if not record.error]
    page.section("Latencies")
    _plot_distributions(page, {
        "time to first token": first_token_seconds(done),
        "between tokens": inter_token_seconds(done),
        "end to end": end_to_end_seconds(done),
    })  # fmt: skip
    page.section("Requests in flight")
    _plot_in_flight(page, records)


def _plot_distributions(page: Page, latencies: Mapping[str, Sequence[float]]) -> None:
    with page.plot("Share of requests, or of gaps between tokens, that took at most so long.") as figure:
        axes = figure.subplots()
        for name, seconds in latencies.items():
            if seconds:
                axes.step(np.sort(seconds) * 1e3, np.arange(1, len(seconds) + 1) / len(seconds), label=name)
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds")
        axes.legend()


def _plot_in_flight(page: Page, records: Sequence[Record]) -> None:
    changes = sorted([(record.due, 1) for record in records] + [(record.ended, -1) for record in records])
    times, counts = np.array([time for time, _ in changes]), np.cumsum([change for _, change in changes])
    with page.plot("Requests that were due and had not ended.") as figure:
        axes = figure.subplots()
        axes.step(times - times[0], counts, where="post")
        axes.set_xlabel("seconds")


def _milliseconds(latency: Latency | None) -> list[str]:
    return [f"{value * 1e3:.1f}" for value in (latency.p50, latency.p90, latency.p99)] if latency else ["", "", ""]
