"""Tables for the command line that fold instead of cutting text, at any width.

rich's own tables cut a word that is wider than its column and put an ellipsis in its place, and they take room from
all columns alike. Here a cell folds instead, and paths and free text give way before numbers and short words do. So
`rich.table.Table` and `Console()` are used in this file alone; tests/unit/test_tables.py holds the package to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import Box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dstrain.formatting import plain

_ENDLESS = 1_000_000
# A column that gives way keeps this many letters while others can give way too; words up to the second stay whole.
_LEAST, _WORD = 12, 24


class _PlainConsole(Console):
    """Shows what stands in a text, and lets the terminal carry out nothing of it."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


def make_console(*, whole_lines: bool = False) -> Console:
    """The terminal, or what stands in its place. It takes nothing in a path or a name for markup or an emoji.

    Args:
        whole_lines: where there is no terminal, a row is a line, however long: for grep and the like.
    """
    console = _PlainConsole(markup=False, emoji=False, highlight=False)
    if whole_lines and not console.is_terminal:
        console.width = _ENDLESS
    return console


@dataclass(frozen=True)
class Column:
    """A column of a `FoldingTable`.

    Attributes:
        heading: above it; may have several lines.
        gives: whether it gives way first: paths, names that may be long, free text.
        right: whether it is aligned to the right, as numbers are.
        style: of its cells, as rich names styles.
        least: columns of the terminal that it takes even if it needs fewer.
    """

    heading: str = ""
    gives: bool = False
    right: bool = False
    style: str = ""
    least: int = 1


class FoldingTable:
    """A table for rich's consoles that loses nothing where it is narrow.

    Where there is too little room, columns that give way are folded, then the others at their spaces, and where even
    that is not enough, the rows stand below each other, a line for each cell.

    Args:
        columns: what they hold. Without any heading the table has no head.
        lines: drawn around the cells, as ``rich.box`` has them.
        gap: spaces between columns where no lines are drawn.
        head: the style of the headings.
    """

    def __init__(self, *columns: Column, lines: Box | None = None, gap: int = 2, head: str = "bold") -> None:
        self._columns = columns
        self._lines = lines
        self._gap = gap
        self._head = head
        self._has_head = any(column.heading for column in columns)
        self._rows: list[tuple[RenderableType, ...]] = []

    def add_row(self, *cells: RenderableType) -> None:
        """A cell for each column. A string is shown as it is: nothing in it is markup."""
        if len(cells) != len(self._columns):
            raise ValueError(f"{len(cells)} cells for {len(self._columns)} columns")
        self._rows.append(tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        cells = sum(size.maximum for size in self._measure(console, options))
        needed = min(cells + self._between(self._gap), options.max_width)
        return Measurement(needed, needed)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = self._fit(self._measure(console, options), options.max_width)
        if fitting is None:
            yield from self._stacked()
            return
        widths, gap = fitting
        table = Table(
            box=self._lines,
            show_header=self._has_head,
            pad_edge=self._lines is not None,
            padding=(0, 1) if self._lines else (0, gap, 0, 0),
        )
        for column, width in zip(self._columns, widths, strict=True):
            table.add_column(
                Text(column.heading),
                justify="right" if column.right else "left",
                style=column.style,
                header_style=self._head,
                width=width,
                overflow="fold",
            )
        for row in self._rows:
            table.add_row(*row)
        yield table

    def _between(self, gap: int) -> int:
        """Columns of the terminal that no cell gets."""
        number = len(self._columns)
        return 3 * number + 1 if self._lines else gap * (number - 1)

    def _measure(self, console: Console, options: ConsoleOptions) -> list[Measurement]:
        """Of each column its longest word and its longest line."""
        measured = []
        endless = options.update(max_width=_ENDLESS, no_wrap=False, overflow="fold")
        for number, column in enumerate(self._columns):
            cells = [Text(column.heading), *(row[number] for row in self._rows)]
            sizes = [Measurement.get(console, endless, cell) for cell in cells]
            minimum, maximum = max(size.minimum for size in sizes), max(size.maximum for size in sizes)
            measured.append(Measurement(max(minimum, column.least), max(maximum, column.least)))
        return measured

    def _fit(self, measured: Sequence[Measurement], room: int) -> tuple[list[int], int] | None:
        """The widths of the columns and the spaces between them; None where words of those that don't give way
        would break."""
        widths = [min(size.maximum, room) for size in measured]
        gives = [column.gives for column in self._columns]
        words = [size.minimum for size in measured]
        whole = [max(_LEAST, min(word, _WORD)) for word in words]
        folded = [floor if may else width for floor, may, width in zip(whole, gives, widths, strict=True)]
        narrow = [_LEAST if may else width for may, width in zip(gives, widths, strict=True)]
        at_spaces = [_LEAST if may else word for may, word in zip(gives, words, strict=True)]
        for gap, floors in ((self._gap, folded), (1, folded), (1, narrow), (1, at_spaces)):
            if _lower(widths, floors, room - self._between(gap)):
                return widths, gap
        return None

    def _stacked(self) -> RenderResult:
        """A block for each row: each cell behind its heading, and below it where that is too much as well."""
        for number, row in enumerate(self._rows):
            if not self._has_head:
                yield from row
                continue
            if number:
                yield Text()
            block = FoldingTable(Column(style=self._head), Column(gives=True))
            for column, cell in zip(self._columns, row, strict=True):
                block.add_row(" ".join(column.heading.replace("-\n", "").split()), cell)
            yield block


def _lower(widths: list[int], floors: Sequence[int], room: int) -> bool:
    """Take room from the widest columns, and from none that is down to its floor. Whether all fit then."""
    while sum(widths) > room:
        above = [number for number, floor in enumerate(floors) if widths[number] > floor]
        if not above:
            return False
        widths[max(above, key=lambda number: widths[number])] -= 1
    return True
