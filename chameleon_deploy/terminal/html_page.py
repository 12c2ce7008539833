"""A self-contained HTML page: sections of text, tables and plots. It opens without network and runs no script."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import DependencyError
from chameleon_deploy.terminal.table import Sheet, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d0d7de; padding-bottom: 0.2rem; }
p { max-width: 48rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { padding: 0.3rem 0.8rem; text-align: left; border-bottom: 1px solid #eaeef2; white-space: pre-wrap; }
th { border-bottom: 2px solid #d0d7de; vertical-align: bottom; }
td.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
figcaption, caption { color: #57606a; font-size: 0.85rem; text-align: left; caption-side: bottom; }
"""
_COLOURS = ["0969da", "bf8700", "1a7f37", "cf222e", "8250df", "57606a", "1b7c83", "bc4c00"]
_PLOT_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', {_COLOURS})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "grid.color": "#eaeef2",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


class Page:
    """A page that is put together from top to bottom and written once. All text is escaped.

    drawings  the SVG of every plot so far

    Raises DependencyError if matplotlib, which draws the plots, is not installed: before any long work begins.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        _require_matplotlib()
        self._title = title
        self.drawings: list[str] = []
        self._body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(subtitle)}</p>"]

    def section(self, heading: str) -> None:
        self._body.append(f"<h2>{escape(heading)}</h2>")

    def text(self, paragraph: str) -> None:
        self._body.append(f"<p>{escape(paragraph)}</p>")

    def table(self, sheet: Sheet) -> None:
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in sheet.rows)
        caption = ". ".join(filter(None, (sheet.title, sheet.caption)))
        self._body.append(
            f'<div class="scroll"><table>{f"<caption>{escape(caption)}</caption>" if caption else ""}'
            f"<thead><tr>{''.join(f'<th>{escape(header)}</th>' for header in sheet.headers)}</tr></thead>\n"
            f"<tbody>\n{body}</tbody></table></div>"
        )

    @contextmanager
    def plot(self, caption: str = "", width: float = 9.0, height: float = 4.0) -> Iterator[Figure]:
        """Yield an empty figure, in inches, to draw on. The page embeds it as SVG with its text as text.

        with page.plot("What it shows.") as figure:
            figure.subplots().plot(x, y)
        """
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({**_PLOT_STYLE, "svg.hashsalt": f"plot {len(self._body)}"}):
            figure = Figure(figsize=(width, height), layout="constrained")
            yield figure
            svg = io.StringIO()
            # no time and no addresses, so that equal figures give equal files
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(svg, format="svg", metadata=nothing)
        drawing = svg.getvalue()
        drawing = drawing[drawing.index("<svg") :]  # HTML does not allow an XML declaration here
        self.drawings.append(drawing)
        self._body.append(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Write the page. The file appears whole or not at all."""
        write_whole(path, lambda partial: partial.write_text(self._html(), encoding="utf-8"))

    def _html(self) -> str:
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            # The policy makes the browser fetch and run nothing.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            '<meta name="viewport" content="width=device-width">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._body)
            + "\n</body>\n</html>\n"
        )


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError("an HTML page needs matplotlib: pip install 'chameleon-deploy[report]'") from error


def _cell(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>' if is_number(text) else f"<td>{escape(text)}</td>"
