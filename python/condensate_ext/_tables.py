"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100  # columns that every table fits; a narrower terminal wraps whole lines


def make_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are figures.

    Headings and text wrap between words, figures do not, and nothing is cut.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for number, heading in enumerate(headings):
        cells = [row[number] for row in rows]
        words = [*heading.split(), *(cells if number else " ".join(cells).split())]
        table.add_column(
            heading,
            justify="right" if number else "left",
            min_width=max(map(len, words)),
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    return table
