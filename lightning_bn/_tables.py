"""A table of layers that fits the console it is printed on: one line a layer, nothing cut in the middle of a word."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.measure import Measurement
from rich.text import Text

from lightning_bn._names import ENOUGH, least_width, shared_prefix, shortened, wrapped

_GAP = 2
"""Spaces between two columns."""


@dataclass(frozen=True)
class Column:
    """A column beside the names.

    Attributes:
        heading: May break between words.
        rank: Where the console is too narrow, the column with the highest goes first.
        justify: Of heading and cells.
        instead: What is said below the table where the column is left out; by default its name, and its cell where that
            is the same in all rows.
    """

    heading: str
    rank: int
    justify: Literal["left", "right"] = "left"
    instead: str = ""


@dataclass(frozen=True)
class _Row:
    name: str
    cells: tuple[str, ...]
    style: str


@dataclass
class LayerTable(JupyterMixin):
    """Layers and what is known of each, laid out when it is printed, for the width of that console.

    The prefix that all names share stands in the title. Names are shortened from the left, columns are left out from
    the least important one on, and a sentence below says which. Sentences wrap between words.

    Attributes:
        title: One sentence without a full stop.
        columns: Beside the names.
        above: Sentences between title and table; one that begins with a dash is an item of a list.
        below: Sentences below the table.
        commands: Of a shell, at the very end; broken between words only, so that they can be copied.
        otherwise: Printed in the place of this one where not all of its columns fit.
    """

    title: str
    columns: Sequence[Column]
    above: Sequence[str] = ()
    below: Sequence[str] = ()
    commands: Sequence[str] = ()
    otherwise: LayerTable | None = None
    rows: list[_Row] = field(default_factory=list)

    def add_row(self, name: str, *cells: str, style: str = "") -> None:
        """Add a layer.

        Args:
            name: Its whole name; empty for the model itself.
            cells: One for each column.
            style: Of the row, as rich has it.
        """
        self.rows.append(_Row(name or "(the model itself)", tuple(cells), style))

    def cells(self, heading: str) -> dict[str, str]:
        """Return what a column says of each layer, by name."""
        index = [column.heading for column in self.columns].index(heading)
        return {row.name: row.cells[index] for row in self.rows}

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(ENOUGH, options.max_width), options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if self.otherwise is not None and self._needed() > width:
            yield from self.otherwise.__rich_console__(console, options)
            return
        prefix = shared_prefix([row.name for row in self.rows])
        yield from _lines(self.title + (f"; all names begin with {prefix}" if prefix else ""), width, "bold")
        yield from _paragraphs(self.above, width)
        shown = self._shown(width)
        if self.rows:
            yield Text()
            yield from self._laid_out(shown, width, options.ascii_only)
        yield from _paragraphs([*self.below, *self._left_out(shown)], width)
        for command in self.commands:
            yield Text()
            yield from (_line(line, whole=True) for line in _of_shell(command, width))

    def _shown(self, width: int) -> list[int]:
        """The columns for which there is room, in their order."""
        shown, least = list(range(len(self.columns))), self._least(width)
        while shown and self._room(shown, width) < least:
            shown.remove(max(shown, key=lambda index: self.columns[index].rank))
        return shown

    def _names(self) -> list[str]:
        prefix = shared_prefix([row.name for row in self.rows])
        return [row.name.removeprefix(prefix) for row in self.rows]

    def _least(self, width: int) -> int:
        """As narrow as names may become before a column goes."""
        most = max(ENOUGH, width // 2)
        return min(max(least_width(self._names(), most), cell_len("layer")), most)

    def _width(self, index: int) -> int:
        """As narrow as a column can be."""
        words = [*self.columns[index].heading.split(), *(row.cells[index] for row in self.rows)]
        return max(map(cell_len, words), default=0)

    def _room(self, shown: Sequence[int], width: int) -> int:
        """What the columns leave for names."""
        return width - sum(self._width(index) + _GAP for index in shown)

    def _needed(self) -> int:
        """The narrowest console that all columns fit on."""
        columns = -self._room(range(len(self.columns)), 0)
        # On a console twice as wide as the columns they leave half of it, which is enough for any names.
        names = max(least_width(self._names(), max(ENOUGH, columns + 1)), cell_len("layer"))
        return next(width for width in count(columns) if width - columns >= min(names, max(ENOUGH, width // 2)))

    def _laid_out(self, shown: Sequence[int], width: int, ascii_only: bool) -> Iterator[Text]:
        room = max(self._room(shown, width), 1)
        names = shortened(self._names(), room, "..." if ascii_only else "…")
        widths = [min(max(map(cell_len, [*names, "layer"])), room)]
        spare = room - widths[0]
        for index in shown:
            least, whole = self._width(index), max(map(cell_len, self.columns[index].heading.splitlines()))
            # A heading in one line where there is room for it.
            widths.append(max(least, whole) if whole - least <= spare else least)
            spare -= widths[-1] - least
        justify = ["left", *(self.columns[index].justify for index in shown)]
        headings = [wrapped("layer", widths[0])]
        for index, given in zip(shown, widths[1:], strict=True):
            parts = self.columns[index].heading.splitlines()
            headings.append([line for part in parts for line in wrapped(part, given)])
        height = max(map(len, headings))
        for line in zip(*([""] * (height - len(one)) + one for one in headings), strict=True):
            yield _line(_aligned(line, widths, justify), "bold")
        yield _line(("-" if ascii_only else "─") * (sum(widths) + _GAP * len(shown)))
        for name, row in zip(names, self.rows, strict=True):
            yield _line(_aligned([name, *(row.cells[index] for index in shown)], widths, justify), row.style)

    def _left_out(self, shown: Sequence[int]) -> list[str]:
        """Which columns there was no room for."""
        gone = [index for index in range(len(self.columns)) if index not in shown]
        if not gone or not self.rows:
            return []
        plain = []
        for index in gone:
            if not self.columns[index].instead:
                cells = {row.cells[index] for row in self.rows}
                heading = " ".join(self.columns[index].heading.split())
                plain.append(f"{heading} ({cells.pop()} in all)" if len(cells) == 1 else heading)
        said = [self.columns[index].instead for index in gone if self.columns[index].instead]
        return said + ([f"Left out below {self._needed()} columns: {'; '.join(plain)}."] if plain else [])


def _paragraphs(sentences: Sequence[str], width: int) -> Iterator[Text]:
    if sentences:
        yield Text()
    for sentence in sentences:
        item = sentence.removeprefix("- ")
        if item == sentence:
            yield from _lines(sentence, width)
        else:
            for number, line in enumerate(wrapped(item, max(width - 2, 1))):
                yield _line(("  " if number else "- ") + line)


def _lines(sentence: str, width: int, style: str = "") -> Iterator[Text]:
    for line in wrapped(sentence, width):
        yield _line(line, style)


def _line(line: str, style: str = "", whole: bool = False) -> Text:
    return Text(line, style, no_wrap=True, overflow="ignore" if whole else None, end="\n")


def _of_shell(command: str, width: int) -> list[str]:
    """Lines that a shell reads as one; a word that is too long for the width stays whole."""
    words: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if words and words[-1].startswith("--") and " " not in words[-1] and not word.startswith("--"):
            words[-1] += f" {word}"  # an option and its value
        else:
            words.append(word)
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if cell_len(f"{lines[-1]} {word} \\") <= width:
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"      {word}")
    return lines


def _aligned(cells: Sequence[str], widths: Sequence[int], justify: Sequence[str]) -> str:
    padded = []
    for cell, width, how in zip(cells, widths, justify, strict=True):
        spaces = " " * (width - cell_len(cell))
        padded.append(spaces + cell if how == "right" else cell + spaces)
    return (" " * _GAP).join(padded).rstrip()
