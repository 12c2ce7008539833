"""The figures of a benchmark: the same tables on a terminal and, with plots, on an HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from chameleon_deploy.bench.peers import FROM_A_CLONE
from chameleon_deploy.bench.run import Benchmark
from chameleon_deploy.bench.timing import Timing
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.html_page import Page
from chameleon_deploy.terminal.table import Sheet


def timing_sheet(measured: Benchmark) -> Sheet:
    """Return a row per part: the bundle's time, and how many times faster it is than each other engine."""
    others = _others(measured)
    rows = [
        [
            timing.part.name,
            f"{timing.seconds[timing.baseline] / timing.part.units * 1e3:.3f} ms/{timing.part.unit}",
            *(f"{timing.ratios[name]:.3f}" if name in timing.ratios else "" for name in others),
        ]
        for timing in measured.timings
    ]
    headers = ["", f"bundle {measured.precision}", *(f"x {name}" for name in others)]
    return Sheet(headers, rows, caption="x: how many times faster the bundle is; medians of ratios of adjacent samples")


def quality_sheet(measured: Benchmark) -> Sheet:
    """Return a row per engine: how far its logits lie from the reference's, and its size."""
    rows = [
        [
            name,
            f"{quality.mean_kl:.1e}",
            f"{quality.p999_kl:.1e}",
            f"{quality.top1:.4f}",
            f"{quality.perplexity:.3f}",
            f"{quality.size / 1e6:.0f} MB",
        ]
        for name, quality in measured.quality.items()
    ]
    perplexity = next((quality.reference_perplexity for quality in measured.quality.values()), 0.0)
    return Sheet(
        ["", "mean KL", "99.9th percentile of KL", "same best token", "perplexity", "size"],
        rows,
        caption=f"against PyTorch in float32, whose perplexity is {perplexity:.3f}; without adaptation",
    )


def reliability_sheet(measured: Benchmark) -> Sheet:
    """Return a row per part: the variation of its figures, and the largest deviation from the reference."""
    rows = [
        [
            timing.part.name,
            f"{timing.interquartile_range[timing.baseline]:.1%}",
            f"{max((timing.interquartile_range[name] for name in timing.ratios), default=0.0):.1%}",
            str(timing.rounds),
            str(timing.retries),
            str(timing.disturbed),
            f"{max(timing.deviations.values()):.1e}",
        ]
        for timing in measured.timings
    ]
    headers = ["", "bundle's interquartile range", "largest of a ratio", "rounds", "retries", "disturbed",
               "largest deviation"]  # fmt: skip
    return Sheet(headers, rows)


def interquartile_sheet(measured: Benchmark) -> Sheet:
    """Return relative interquartile ranges: of the bundle's seconds, and of each ratio."""
    others = _others(measured)
    rows = [
        [
            timing.part.name,
            *(
                f"{timing.interquartile_range[name]:.1%}" if name in timing.interquartile_range else ""
                for name in (timing.baseline, *others)
            ),
        ]
        for timing in measured.timings
    ]
    return Sheet(["", "bundle", *(f"x {name}" for name in others)], rows)


def deviation_sheet(measured: Benchmark) -> Sheet:
    rows = [
        [timing.part.name, name, f"{deviation:.2e}", f"{timing.bounds[name]:g}"]
        for timing in measured.timings
        for name, deviation in timing.deviations.items()
    ]
    return Sheet(["", "engine", "deviation", "allowed"], rows)


def missing_sheet(measured: Benchmark) -> Sheet:
    return Sheet(["not compared", "why"], [[name, reason] for name, reason in measured.not_compared.items()])


def summary(measured: Benchmark) -> Iterator[str]:
    """Return sentences on the machine, its environment, the footprint and, in a wheel, the missing engines."""
    footprint = measured.footprint
    yield f"{measured.precision}, {measured.threads} threads of {measured.machine['processor']}."
    if measured.machine.get("integer weights") == "uint8":
        yield (
            "int8 weights would saturate in integer products on this processor: the bundle's are uint8, to the same "
            "bits. Other engines may saturate, as CTranslate2 does: compare their quality here with that elsewhere."
        )
    if environment := measured.machine.get("environment"):
        yield f"The environment changes the threads of other engines, and so their times: {environment}."
    yield (
        f"Loading in a fresh process: {footprint.load_seconds:.2f} s, {footprint.resident / 1e6:.0f} MB resident "
        f"({footprint.resident / measured.weights_bytes:.2f} x the weights); of a further worker that shares the "
        f"weights {footprint.shared_load_seconds:.2f} s and {footprint.shared_private / 2**20:.0f} MiB private. "
        f"Peak with a generation of batch 8: {footprint.peak / 2**20:.0f} MiB."
    )
    if FROM_A_CLONE in measured.missing.values():
        yield "This is an installed wheel: other engines are compared from a clone of the repository."


def new_page(name: str) -> Page:
    """Return a page about a bundle or a model. Raises DependencyError if plots cannot be drawn."""
    return Page(f"Benchmark of {name}", "chameleon-deploy bench")


def fill(page: Page, measured: Benchmark) -> None:
    page.section("Speed")
    page.table(timing_sheet(measured))
    _plot_ratios(page, measured.timings)
    if measured.quality:
        page.section("Quality")
        page.table(quality_sheet(measured))
    page.section("Variation")
    page.text("Relative interquartile ranges over the rounds: of the bundle's seconds, and of each ratio.")
    page.table(interquartile_sheet(measured))
    page.section("Correctness")
    page.text(
        "Largest difference from the PyTorch reference's log-probabilities in fp32, root mean square elsewhere; of a "
        "chosen token, by how much its logit falls short of the reference's best."
    )
    page.table(deviation_sheet(measured))
    page.section("Loading and memory")
    for line in summary(measured):
        page.text(line)
    page.section("Parts of a generation")
    for timing, parts in _generations(measured):
        _plot_bars(page, parts, f"Milliseconds of the bundle: {timing.part.name}")
    page.section("Not compared")
    if measured.not_compared:
        page.table(missing_sheet(measured))
    else:
        page.text("Every engine ran.")
    page.section("Machine")
    page.table(Sheet(["", ""], list(measured.machine.items())))


def print_tables(measured: Benchmark) -> None:
    sheets = (timing_sheet(measured), quality_sheet(measured), reliability_sheet(measured), missing_sheet(measured))
    console.show(*(sheet for sheet in sheets if sheet.rows))
    for line in summary(measured):
        console.stdout.print(line)


def _generations(measured: Benchmark) -> Iterator[tuple[Timing, dict[str, float]]]:
    """Yield each whole generation with the milliseconds of its laps."""
    for whole in measured.timings:
        if whole.part.kind == "generation":
            parts = {
                timing.part.kind: 1e3 * timing.seconds[timing.baseline]
                for timing in measured.timings
                if timing.part.batch == whole.part.batch and timing.part.kind in ("adaptation", "prefill", "decode")
            }
            yield whole, parts | {"prefill": parts["prefill"] - parts["adaptation"]}


def _plot_ratios(page: Page, timings: list[Timing]) -> None:
    others = list(dict.fromkeys(name for timing in timings for name in timing.ratios))
    with page.plot(
        "Seconds relative to the bundle's, which is 1: longer is slower", height=0.9 * len(timings)
    ) as figure:
        axes = figure.subplots()
        height = 0.8 / max(len(others), 1)
        for i, name in enumerate(others):
            places = [row + (i - (len(others) - 1) / 2) * height for row, t in enumerate(timings) if name in t.ratios]
            axes.barh(places, [t.ratios[name] for t in timings if name in t.ratios], height, label=name)
        axes.axvline(1, color="#1f2328", linewidth=1)
        axes.set_yticks(range(len(timings)), [timing.part.name for timing in timings])
        axes.invert_yaxis()
        if others:
            axes.legend()


def _plot_bars(page: Page, values: Mapping[str, float], caption: str) -> None:
    with page.plot(caption, height=0.7 + 0.3 * len(values)) as figure:
        axes = figure.subplots()
        axes.barh(list(values), list(values.values()))
        axes.invert_yaxis()


def _others(measured: Benchmark) -> list[str]:
    return list(dict.fromkeys(name for timing in measured.timings for name in timing.ratios))
