"""One table type for a terminal, a pipe and an HTML page."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

UNLIMITED = 10_000  # characters: the width of a pipe
SHORT, LONG_WORD = 12, 24  # characters: a text up to SHORT stays on one line, a word over LONG_WORD may be split
FRAME = 3  # characters between the texts of two columns


@dataclass(frozen=True)
class Sheet:
    """A table of plain text without markup.

    sections  numbers of the rows that are followed by a line
    marked    numbers of the rows that need attention
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    sections: Collection[int] = ()
    marked: Collection[int] = ()

    def to_rich(self, width: int = UNLIMITED) -> Iterator[Table]:
        """Return the sheet in at most `width` characters (80 or more). No heading and no number is truncated.

        Text wraps between words. Columns that do not fit follow in further tables, which repeat the leading columns of
        text.
        """
        columns = [_Column(header, [row[i] for row in self.rows]) for i, header in enumerate(self.headers)]
        parts = list(_split(columns, width))
        for number, part in enumerate(parts):
            table = _to_rich(self, part, width)
            table.title = _line(self.title if number == 0 else "")
            table.caption = _line(self.caption if number == len(parts) - 1 else "")
            yield table


def is_number(cell: str) -> bool:
    """Return whether a cell is aligned as a number, with an optional interval or unit: "+1.2% [-0.1, 2.5]", "3
    ms/token".
    """
    words = sum(word[0].isalpha() for word in cell.split())
    return cell.lstrip("+-\N{MINUS SIGN}")[:1].isdigit() and words <= 1


def printable(text: str) -> str:
    """Return a text with its control characters made visible."""
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text.expandtabs(4))


class _Column:
    """A column's widths in characters: below `least` text is truncated, above `natural` there is padding."""

    def __init__(self, header: str, cells: Sequence[str]) -> None:
        self.header, self.cells = printable(header), [printable(cell) for cell in cells]
        filled = [cell for cell in self.cells if cell]
        lines = [line for text in (self.header, *self.cells) for line in text.splitlines()]
        words = [word for line in lines for word in line.split()]
        self.is_number = bool(filled) and all(map(is_number, filled))
        self.natural = max(map(len, lines), default=0)
        unbroken = [line for line in lines if len(line) <= SHORT] + [word[:LONG_WORD] for word in words]
        self.least = max(map(len, self.header.split() + self.cells if self.is_number else unbroken), default=0)


def _split(columns: list[_Column], width: int) -> Iterator[list[_Column]]:
    """Group columns so that each group fits into `width`; each starts with the leading columns of text."""
    count = next((i for i, column in enumerate(columns) if column.is_number), len(columns))
    keys, others = columns[:count], columns[count:]
    group: list[_Column] = []
    for column in others:
        if group and _total([*keys, *group, column]) > width:
            yield [*keys, *group]
            group = []
        group.append(column)
    yield [*keys, *group]


def _total(columns: list[_Column]) -> int:
    """Return the least width of a table with these columns, including its frame."""
    return sum(column.least + FRAME for column in columns) + 1


def _widths(columns: list[_Column], width: int) -> list[int]:
    """Return widths that fill at most `width`; the columns that lack least get their full width first."""
    widths = [column.least for column in columns]
    spare = max(0, width - _total(columns))
    order = sorted(range(len(columns)), key=lambda i: columns[i].natural - columns[i].least)
    for place, i in enumerate(order):
        given = min(columns[i].natural - widths[i], spare // (len(order) - place))
        widths[i] += given
        spare -= given
    return widths


def _to_rich(sheet: Sheet, columns: list[_Column], width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title_justify="left", caption_justify="left")
    for column, taken in zip(columns, _widths(columns, width), strict=True):
        table.add_column(Text(column.header), width=taken, justify="right" if column.is_number else "left",
                         overflow="fold")  # fmt: skip
    for number in range(len(sheet.rows)):
        table.add_row(
            *(Text(column.cells[number]) for column in columns),
            end_section=number in sheet.sections,
            style="bold red" if number in sheet.marked else None,
        )
    return table


def _line(text: str) -> Text | None:
    from rich.text import Text

    return Text(printable(text)) if text else None
