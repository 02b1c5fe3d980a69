"""Output of the commands: tables of 80 columns in plain characters, and a line of progress."""

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

WIDTH = 80
GOOD, BAD, OURS, HEAD = "green", "bold red", "bold", "bold"


def console() -> Console:
    """Prints lines as they are. Colours are for a terminal; NO_COLOR takes them away."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def paragraph(text: str, indent: int = 0) -> str:
    """Filled to the width of a page; lines after the first are indented."""
    return textwrap.fill(
        text,
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


@dataclass
class Column:
    heading: str
    left: bool = False  # text; numbers stand on the right
    width: int = 0  # at least

    def cell(self, text: str) -> str:
        return text.ljust(self.width) if self.left else text.rjust(self.width)


@dataclass
class Table:
    """Lines under headings. A column is as wide as its widest cell: nothing is folded or cut."""

    columns: Sequence[Column]
    title: str = ""
    note: str = ""
    rows: list[tuple[Sequence[str], str]] = field(default_factory=list)

    def add(self, *cells: str, style: str = "") -> None:
        """A line of cells; a single one is a heading across the table."""
        self.rows.append((cells, style))

    def fit(self) -> None:
        for number, column in enumerate(self.columns):
            texts = [cells[number] for cells, _ in self.rows if len(cells) > 1]
            column.width = max(column.width, len(column.heading), *map(len, texts))

    def head(self) -> Iterator[tuple[str, str]]:
        if self.title:
            yield self.title, HEAD
        yield self.line([column.heading for column in self.columns]), ""
        yield self.line(["-" * column.width for column in self.columns]), ""

    def lines(self) -> Iterator[tuple[str, str]]:
        """Each with its style."""
        self.fit()
        yield from self.head()
        for cells, style in self.rows:
            yield self.line(cells), style
        if self.note:
            yield paragraph(self.note), ""

    def line(self, cells: Sequence[str]) -> str:
        if len(cells) == 1:
            return cells[0]
        pairs = zip(self.columns, cells, strict=True)
        return "  ".join(column.cell(text) for column, text in pairs).rstrip()

    def print(self, to: Console) -> None:
        for text, style in self.lines():
            to.print(Text(text, style=style))
        to.print()


class Progress:
    """One line on stderr, written over and over, and only on a terminal.

    It is drawn when something is said: a thread that draws would be in the processor time.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.start = time.monotonic()
        self.shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, text: str) -> None:
        if self.shown:
            minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
            line = f"{self.done}/{self.total}  {minutes}:{seconds:02}  {text}"
            room = shutil.get_terminal_size().columns - 1
            self._write(line[:room])

    def step(self) -> None:
        self.done += 1

    def clear(self) -> None:
        """Erases the line, before something else is printed."""
        if self.shown:
            self._write("")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()
