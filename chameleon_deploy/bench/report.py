"""How a benchmark is shown: the same tables to people on a terminal and, with plots, on an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from chameleon_deploy import console
from chameleon_deploy.bench.run import Benchmark
from chameleon_deploy.bench.timing import Timing
from chameleon_deploy.html_page import Report


class Grid(NamedTuple):
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def timing_grid(measured: Benchmark) -> Grid:
    """A row per part: the bundle's time, its share of the floor, and how many times faster it is than the others."""
    others = _others(measured)
    rows = [
        [
            timing.part.name,
            f"{_bundle(timing) / timing.part.units * 1e3:.3f} ms/{timing.part.unit}",
            f"{timing.share:.0%}",
            *(f"{timing.ratios[name]:.3f}" if name in timing.ratios else "" for name in others),
            f"{max(timing.spread.values()):.0%}",
            f"{timing.rounds}, {timing.retries}, {timing.disturbed}",
            f"{max(timing.deviations.values()):.1e}",
        ]
        for timing in measured.timings
    ]
    headers = ["", "bundle", "of the floor", *(f"x {name}" for name in others), "spread",
               "rounds, retries, disturbed", "worst deviation"]  # fmt: skip
    return Grid(headers, rows, "x: how many times faster the bundle is; medians of ratios of two samples in a row")


def spread_grid(measured: Benchmark) -> Grid:
    """Relative interquartile ranges: of the bundle's seconds, and of each ratio."""
    others = _others(measured)
    rows = [
        [t.part.name, *(f"{t.spread[name]:.1%}" if name in t.spread else "" for name in ["bundle", *others])]
        for t in measured.timings
    ]
    return Grid(["", "bundle", *(f"x {name}" for name in others)], rows)


def deviation_grid(measured: Benchmark) -> Grid:
    rows = [
        [timing.part.name, name, f"{deviation:.2e}", f"{timing.bounds[name]:g}"]
        for timing in measured.timings
        for name, deviation in timing.deviations.items()
    ]
    return Grid(["", "engine", "deviation", "allowed"], rows)


def split_grid(measured: Benchmark) -> Grid:
    total = sum(measured.cost_split.values())
    rows = [
        [name, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}"]
        for name, seconds in sorted(measured.cost_split.items(), key=lambda item: -item[1])
    ]
    return Grid(["part of one generation, batch 8", "ms", "share"], rows)


def missing_grid(measured: Benchmark) -> Grid:
    return Grid(["not compared", "why"], [[name, reason] for name, reason in measured.not_compared.items()])


def summary(measured: Benchmark) -> Iterator[str]:
    """What needs no table, a sentence each."""
    footprint, ceilings = measured.footprint, measured.ceilings
    reading = sorted(found.bytes_per_second / 1e9 for found in ceilings)
    operations = sorted(found.operations_per_second / 1e9 for found in ceilings)
    yield (
        f"{measured.precision}, {measured.threads} threads of {measured.machine['processor']}. Ceilings of its "
        f"{len(ceilings)} rounds: {reading[0]:.1f} to {reading[-1]:.1f} GB/s reading, {operations[0]:.0f} to "
        f"{operations[-1]:.0f} G operations/s of {ceilings[0].operations}."
    )
    yield (
        f"Loading in a fresh process: {footprint.seconds:.2f} s, {footprint.resident / 1e6:.0f} MB resident "
        f"({footprint.resident / measured.weights_bytes:.2f} x the weights), {footprint.private / 2**20:.0f} MiB of it "
        f"private to a further worker, {footprint.shared_private / 2**20:.0f} MiB where workers share the weights "
        f"({footprint.shared_seconds:.2f} s to load). Peak with a generation of batch 8: "
        f"{footprint.peak / 2**20:.0f} MiB, scoring {footprint.peak_scoring / 2**20:.0f} MiB, "
        f"with full logits {footprint.peak_full_logits / 2**20:.0f} MiB."
    )


def new_page(bundle: Path) -> Report:
    """Raises DependencyError when plots cannot be drawn."""
    return Report(f"Benchmark of {bundle.name}", "chameleon-deploy bench")


def fill(page: Report, measured: Benchmark) -> None:
    page.section("How fast")
    page.table(*timing_grid(measured))
    _plot_ratios(page, measured)
    page.section("How sure")
    page.text("Relative interquartile ranges over the rounds: of the bundle's seconds, and of each ratio.")
    page.table(*spread_grid(measured))
    page.section("How right")
    page.text(
        "Largest difference from the PyTorch reference's log-probabilities in fp32, root mean square elsewhere; of a "
        "chosen token, by how much its logit falls short of the reference's best."
    )
    page.table(*deviation_grid(measured))
    page.section("Distance to the floor")
    for line in summary(measured):
        page.text(line)
    _plot_bars(page, {t.part.name: t.share for t in measured.timings}, "Share of the floor: what no "
               "engine can beat that reads the weights once and computes the matrix products")  # fmt: skip
    page.section("Where the time of one generation goes")
    page.table(*split_grid(measured))
    _plot_bars(page, measured.cost_split, "Seconds of the parts of one generation, batch 8")
    page.section("Not compared")
    if measured.not_compared:
        page.table(*missing_grid(measured))
    else:
        page.text("Every engine ran.")
    page.section("Machine")
    page.table(["", ""], list(measured.machine.items()))


def _plot_ratios(page: Report, measured: Benchmark) -> None:
    others, timings = _others(measured), measured.timings
    with page.plot(
        "Seconds relative to the bundle's, which is 1: longer is slower", height=0.9 * len(timings)
    ) as figure:
        axes = figure.subplots()
        height = 0.8 / len(others)
        for i, name in enumerate(others):
            places = [row + (i - (len(others) - 1) / 2) * height for row, t in enumerate(timings) if name in t.ratios]
            axes.barh(places, [t.ratios[name] for t in timings if name in t.ratios], height, label=name)
        axes.axvline(1, color="#1f2328", linewidth=1)
        axes.set_yticks(range(len(timings)), [timing.part.name for timing in timings])
        axes.invert_yaxis()
        axes.legend()


def _plot_bars(page: Report, values: dict[str, float], caption: str) -> None:
    with page.plot(caption, height=0.7 + 0.3 * len(values)) as figure:
        axes = figure.subplots()
        axes.barh(list(values), list(values.values()))
        axes.invert_yaxis()


def _bundle(timing: Timing) -> float:
    return timing.seconds["bundle"]


def _others(measured: Benchmark) -> list[str]:
    return list(dict.fromkeys(name for timing in measured.timings for name in timing.ratios))


def print_tables(measured: Benchmark) -> None:
    for grid in (timing_grid(measured), split_grid(measured),
                 missing_grid(measured)):  # fmt: skip
        if grid.rows:
            table = Table(*grid.headers, caption=grid.caption)
            for row in grid.rows:
                table.add_row(*row)
            console.stdout.print(table)
    for line in summary(measured):
        console.stdout.print(line)
