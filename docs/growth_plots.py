"""Draws the curves of docs/performance.md from what `bench.growth --json` wrote: growth_plots.py DIRECTORY FILE...

Files of one precision are put together, so that a run may be split by --curve.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from chameleon_deploy.bench.growth.curves import CURVES
from chameleon_deploy.bench.growth.report import plot
from chameleon_deploy.bench.growth.run import Growth, Measured
from chameleon_deploy.terminal.html_page import Page


def main(directory: Path, files: list[Path]) -> None:
    of_precision: dict[str, list[Measured]] = {}
    for file in files:
        growth = msgspec.json.decode(file.read_bytes(), type=Growth)
        of_precision.setdefault(growth.precision, []).extend(growth.measured)
    directory.mkdir(exist_ok=True)
    for precision, measured in of_precision.items():
        for curve in CURVES:
            own = [one for one in measured if one.curve == curve]
            if own:
                page = Page(curve)
                plot(page, own, curve)
                (directory / f"{precision}-{curve}.svg").write_text(page.drawings[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])
