"""The drift between tasks as a table that a person reads."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.markup import escape
from rich.table import Column, Table

from lightning_bn._tables import plain_table
from lightning_bn.functional._text import counted
from lightning_bn.functional.tasks.drift import APART, TaskDrift

_FOR_NAMES = 36
"""Of 80 characters, what names of layers and the last column need."""


def task_drift_table(drift: TaskDrift, above: float = APART, most: int = 10) -> Table:
    """How far tasks lie apart in each layer, the furthest first, and below it which layers need a set for each task.

    A column for each two tasks where these fit into 80 characters, else the two that lie furthest apart.

    Args:
        drift: What :func:`~lightning_bn.functional.task_drift` gave.
        above: The drift from which on a layer needs a set for each task, as for ``TaskDrift.suggest``.
        most: How many layers to show.
    """
    pairs, largest = drift.pairs(), drift.largest()
    needs = {name: not value <= above for name, value in largest.items()}
    places = {name: index for index, name in enumerate(drift.layers)}
    order = sorted(drift.layers, key=lambda name: -_finite_or_most(largest[name]))
    widths = [max(*map(len, pair), len("0.0012")) + 1 for pair in pairs]
    by_pair = sum(widths) <= 80 - _FOR_NAMES
    columns = [Column("layer", overflow="fold", min_width=24)]
    if by_pair:
        columns += [Column(escape("\n".join(pair)), justify="right", no_wrap=True) for pair in pairs]
    else:
        columns += [Column("furthest apart", overflow="fold", max_width=32), Column("drift", justify="right")]
    title = f"Running statistics of {counted(len(drift.layers), 'BatchNorm layer')} by task, the furthest apart first"
    rest = len(order) - most
    said = [f"... {rest} more in which tasks lie closer"] * (rest > 0) + [_suggested(drift, above, needs, largest)]
    table = plain_table(title, "\n".join(said), [*columns, Column("sets", min_width=8)], padding=(0, 1, 0, 0))
    for name in order[:most]:
        values = {pair: of_layers[places[name]] for pair, of_layers in pairs.items()}
        worst = max(values, key=lambda pair: _finite_or_most(values[pair]))
        shown = list(values.values()) if by_pair else [values[worst]]
        table.add_row(
            escape(name or "(the model itself)"),
            *([] if by_pair else [escape(", ".join(worst))]),
            *(f"{value:.2g}" for value in shown),
            "per task" if needs[name] else "one",
            style="yellow" if needs[name] else None,
        )
    return table


def _suggested(drift: TaskDrift, above: float, needs: Mapping[str, bool], largest: Mapping[str, float]) -> str:
    """Which layers need a set for each task, as it is given to TaskBatchNorm, and how far tasks lie apart in others."""
    paths = drift.suggest(above)
    if not paths:
        return f"One set serves all tasks: no layer's drift is above {above:g}."
    same = [largest[name] for name, needed in needs.items() if not needed]
    enough = f" In others one set is enough: at most {max(same):.2g}." if same else ""
    return escape(f"A set for each task: modules: [{', '.join(paths)}].{enough}")


def _finite_or_most(value: float) -> float:
    """A drift to order by: what is not a number is the largest."""
    return math.inf if math.isnan(value) else value
