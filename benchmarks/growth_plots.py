"""Draws curves from what `benchmarks.growth --json` wrote, one SVG per precision and curve.

    python -m benchmarks.growth_plots docs/lab/growth growth.json ...

Files of one precision are put together, so that a run may be split by --curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from benchmarks.growth import AXES, CURVES, FIGURES, TITLES, CurveName, Growth, Measured
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.html_page import Page


def main(
    directory: Annotated[Path, typer.Argument(help="Where the drawings go.")],
    files: Annotated[list[Path], typer.Argument(help="What `benchmarks.growth --json` wrote.")],
) -> None:
    """Draw first tokens, steps and memory over batch, length and factor sets."""
    of_precision: dict[str, list[Measured]] = {}
    for file in files:
        growth = msgspec.json.decode(file.read_bytes(), type=Growth)
        of_precision.setdefault(growth.precision, []).extend(growth.measured)
    directory.mkdir(parents=True, exist_ok=True)
    for precision, measured in of_precision.items():
        for curve in CURVES:
            if own := [one for one in measured if one.curve == curve]:
                page = Page(curve)
                plot(page, own, curve)
                (directory / f"{precision}-{curve}.svg").write_text(page.drawings[0])


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


if __name__ == "__main__":
    console.run(main)
