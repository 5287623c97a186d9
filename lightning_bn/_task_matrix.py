"""How far each two tasks lie apart where they do most: a matrix where it fits the console, a list where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lightning_bn._names import wrapped
from lightning_bn.functional._text import counted
from lightning_bn.functional.statistics.opened_files import shown
from lightning_bn.functional.tasks.drift import TaskDrift

_MOST_PAIRS = 10


@dataclass(frozen=True)
class TaskMatrix:
    """From the row's task to the column's, the drift of the layer that lies furthest apart.

    Attributes:
        drift: What :func:`~lightning_bn.functional.task_drift` gave.
        measure: Its name.
    """

    drift: TaskDrift
    measure: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"Largest drift of a layer, from the row's task to the column's ({self.measure})"
        lines = list(self._matrix())
        if max(map(cell_len, lines)) > options.max_width:
            title, lines = f"Tasks that lie furthest apart ({self.measure})", list(self._pairs())
        for line in wrapped(title, options.max_width):
            yield Text(line, "bold", no_wrap=True)
        yield Text()
        for line in lines:
            fits = cell_len(line) <= options.max_width
            for part in [line] if fits else wrapped(line, options.max_width):
                yield Text(part, no_wrap=True)

    def _matrix(self) -> Iterator[str]:
        tasks = [shown(task, 30) for task in self.drift.tasks]
        values = self.drift.values.amax(-1).tolist()
        widths = [max(cell_len(task), 6) for task in tasks]
        first = max(map(cell_len, tasks))
        yield "  ".join([" " * first, *(_right(task, width) for task, width in zip(tasks, widths, strict=True))])
        for row, task in enumerate(tasks):
            cells = ["-" if row == column else f"{value:.2g}" for column, value in enumerate(values[row])]
            yield "  ".join(
                [
                    task + " " * (first - cell_len(task)),
                    *(_right(cell, width) for cell, width in zip(cells, widths, strict=True)),
                ]
            )

    def _pairs(self) -> Iterator[str]:
        pairs = self.drift.pairs()
        order = sorted(pairs, key=lambda pair: -max(pairs[pair]))
        for one, other in order[:_MOST_PAIRS]:
            values = pairs[one, other]
            layer = self.drift.layers[values.index(max(values))]
            yield f"{shown(one, 30)}, {shown(other, 30)}: {max(values):.2g} at {shown(layer)}"
        if len(order) > _MOST_PAIRS:
            yield f"... {counted(len(order) - _MOST_PAIRS, 'more pair')} that lie closer"


def _right(cell: str, width: int) -> str:
    return " " * (width - cell_len(cell)) + cell
