"""The curves as tables and, on a page, as plots."""

from __future__ import annotations

from collections.abc import Sequence

from chameleon_deploy.bench.growth.curves import CURVES, CurveName
from chameleon_deploy.bench.growth.run import Growth, Measured
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.html_page import Page
from chameleon_deploy.terminal.table import Sheet

TITLES = {
    CurveName.BATCH: "Batch: prompts of 128 tokens",
    CurveName.LENGTH: "Length of the prompt: one row",
    CurveName.FACTOR_SETS: "Factor sets: 64 rows, prompts of 128 tokens",
}
AXES = {CurveName.BATCH: "rows", CurveName.LENGTH: "tokens of the prompt", CurveName.FACTOR_SETS: "factor sets"}
FIGURES = (  # of a point: name, attribute, factor to the unit
    ("first token, ms", "first_token", 1e3),
    ("step, ms", "step", 1e3),
    ("memory beyond the loaded model, MiB", "memory", 2**-20),
)


def curve_sheet(measured: Sequence[Measured], curve: CurveName, attribute: str) -> Sheet:
    """Return one figure of a curve: a row per point, a column per engine."""
    name, _, factor = next(figure for figure in FIGURES if figure[1] == attribute)
    own = [one for one in measured if one.curve == curve]
    engines = list(dict.fromkeys(one.engine for one in own))
    values = {(one.x, one.engine): f"{getattr(one, attribute) * factor:.1f}" for one in own}
    rows = [[str(x), *(values.get((x, engine), "") for engine in engines)] for x in dict.fromkeys(o.x for o in own)]
    return Sheet([AXES[curve], *engines], rows, title=f"{TITLES[curve]}: {name}")


def sheets(growth: Growth) -> list[Sheet]:
    """Return the tables of all curves that were measured, then of what failed."""
    curves = [curve for curve in CURVES if any(one.curve == curve for one in growth.measured)]
    found = [curve_sheet(growth.measured, curve, attribute) for curve in curves for _, attribute, _ in FIGURES]
    missing = Sheet(["not measured", "why"], [[name, reason] for name, reason in growth.failed.items()])
    return found + [missing] * bool(growth.failed)


def print_tables(growth: Growth) -> None:
    console.show(*sheets(growth))


def fill(page: Page, growth: Growth) -> None:
    for curve in CURVES:
        own = [one for one in growth.measured if one.curve == curve]
        if own:
            page.section(f"{TITLES[curve]}, {growth.precision}")
            plot(page, own, curve)
    page.section("Figures")
    for sheet in sheets(growth):
        page.table(sheet)
    page.section("Machine")
    page.table(Sheet(["", ""], [*growth.machine.items(), ("threads", str(growth.threads))]))


def plot(page: Page, measured: Sequence[Measured], curve: CurveName) -> None:
    """Draw the figures of one curve beside each other, with a line per engine and logarithmic axes."""
    engines = list(dict.fromkeys(one.engine for one in measured))
    with page.plot(f"{TITLES[curve]}. Both axes are logarithmic.", width=12.0, height=3.6) as figure:
        for axes, (name, attribute, factor) in zip(figure.subplots(1, len(FIGURES)), FIGURES, strict=True):
            for engine in engines:
                own = [one for one in measured if one.engine == engine]
                axes.plot([one.x for one in own], [getattr(one, attribute) * factor for one in own], marker="o",
                          markersize=3, linewidth=1.2, label=engine)  # fmt: skip
            ticks = list(dict.fromkeys(one.x for one in measured))
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(x) for x in ticks])
            axes.set_yscale("log")
            axes.set_title(name, fontsize=9)
            axes.set_xlabel(AXES[curve])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(engines))
