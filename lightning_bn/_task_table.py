"""The drift between tasks as a table that a person reads."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_bn._tables import Column, LayerTable
from lightning_bn.functional._text import counted
from lightning_bn.functional.tasks.drift import APART, TaskDrift


def task_drift_table(drift: TaskDrift, above: float = APART, most: int = 10) -> LayerTable:
    """How far tasks lie apart in each layer, the furthest first, and below it which layers need a set for each task.

    A column for each two tasks where these fit on the console, else the two that lie furthest apart.

    Args:
        drift: What :func:`~lightning_bn.functional.task_drift` gave.
        above: The drift from which on a layer needs a set for each task, as for ``TaskDrift.suggest``.
        most: How many layers to show.
    """
    pairs, largest = drift.pairs(), drift.largest()
    needs = {name: not value <= above for name, value in largest.items()}
    order = sorted(drift.layers, key=lambda name: -_finite_or_most(largest[name]))
    title = f"Running statistics of {counted(len(drift.layers), 'BatchNorm layer')} by task, the furthest apart first"
    rest = len(order) - most
    said = [f"... {rest} more in which tasks lie closer"] * (rest > 0) + [_suggested(drift, above, needs, largest)]
    sets = Column("sets", 2)
    furthest = LayerTable(title, [Column("furthest apart", 3), Column("drift", 1, "right"), sets], below=said)
    by_pair = [Column("\n".join(pair), 3, "right") for pair in pairs]
    table = LayerTable(title, [*by_pair, sets], below=said, otherwise=furthest)
    for name in order[:most]:
        place = drift.layers.index(name)
        values = {pair: of_layers[place] for pair, of_layers in pairs.items()}
        worst = max(values, key=lambda pair: _finite_or_most(values[pair]))
        needed, style = ("per task", "yellow") if needs[name] else ("one", "")
        table.add_row(name, *(f"{value:.2g}" for value in values.values()), needed, style=style)
        furthest.add_row(name, ", ".join(worst), f"{values[worst]:.2g}", needed, style=style)
    return table


def _suggested(drift: TaskDrift, above: float, needs: Mapping[str, bool], largest: Mapping[str, float]) -> str:
    """Which layers need a set for each task, as it is given to TaskBatchNorm, and how far tasks lie apart in others."""
    paths = drift.suggest(above)
    if not paths:
        return f"One set is enough for all tasks: no layer's drift is above {above:g}."
    same = [largest[name] for name, needed in needs.items() if not needed]
    enough = f" For other layers one set is enough: drift at most {max(same):.2g}." if same else ""
    return f"Layers that need a set for each task: modules: [{', '.join(paths)}].{enough}"


def _finite_or_most(value: float) -> float:
    """A drift to order by: what is not a number is the largest."""
    return math.inf if math.isnan(value) else value
