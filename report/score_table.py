"""A table that fits any screen: columns that do not fit are printed below, with the names of the rows repeated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from .terminal import printable

_GAP = 2  # characters between columns
_WIDEST_HEADER = 14  # characters; a longer one is wrapped


@dataclass(frozen=True)
class ScoreTable:
    """Plain data as a table.

    Attributes
    ----------
    columns, rows
        Names of the columns, and the cells of each row. The first cell is the name of the row.
    title
        A line above the table.
    text_columns
        How many columns, from the left, are text; the others are numbers, aligned on the right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    text_columns: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        if self.title:
            yield Text(printable(self.title), overflow="fold", no_wrap=False)
        widths = self._widths(options.max_width)
        for numbers in _groups(widths, options.max_width):
            table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
            for number in numbers:
                table.add_column(
                    self.columns[number],
                    width=widths[number],
                    overflow="fold",
                    justify="left" if number < self.text_columns else "right",
                )
            for row in self.rows:
                table.add_row(*(row[number] for number in numbers))
            yield table
            yield Text()

    def _widths(self, room: int) -> list[int]:
        """Return the width of each column; that of the first is at most a third of ``room``."""
        widths = []
        for number, name in enumerate(self.columns):
            cells = [cell_len(printable(row[number])) for row in self.rows]
            widths.append(max([min(cell_len(printable(name)), _WIDEST_HEADER), *cells, 1]))
        first = min(widths[0], room // 3)
        return [first, *(min(width, room - first - _GAP) for width in widths[1:])]


def _groups(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Yield the numbers of the columns of each table: the first column, and as many others as fit beside it."""
    group = [0]
    for number in range(1, len(widths)):
        needed = sum(widths[each] + _GAP for each in group) + widths[number]
        if needed > room and len(group) > 1:
            yield group
            group = [0]
        group.append(number)
    yield group
