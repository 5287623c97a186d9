"""Tables that a person reads, made of what the ground floor returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from torch import nn

from lightning_bn._drift_table import batch_of, drift_table, sparkline
from lightning_bn._kinds import kinds_line, not_listed, one_kind, paths_of
from lightning_bn._tables import Column, LayerTable
from lightning_bn._task_table import task_drift_table
from lightning_bn.functional._text import counted
from lightning_bn.functional.freezing.freeze_plan import FreezePlan
from lightning_bn.functional.layers.behavior import LayerBehavior, describe
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.layers.status import LayerStatus, status_by_name

__all__ = ["behavior_table", "drift_table", "plan_table", "print_behavior", "print_plan", "sparkline"]
__all__ += ["task_drift_table"]


def print_behavior(
    model: nn.Module,
    modules: Patterns = None,
    *,
    exclude: Patterns = None,
    root: str = "",
    console: Console | None = None,
) -> None:
    """Print what the next forward of each selected BatchNorm layer does, one layer a line.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.
        console: Where to; None for standard output.

    Raises:
        SelectionError: As for ``batch_norm_layers``.
    """
    behaviors = describe(model, modules, exclude=exclude, root=root)
    table = behavior_table(behaviors, status_by_name(model), LayerSelection(modules, exclude, root).lookalikes(model))
    (console or Console()).print(table)


def behavior_table(
    behaviors: Sequence[LayerBehavior],
    statuses: dict[str, LayerStatus] | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> LayerTable:
    """What each layer's next forward does, as a table that can be read without knowing torch's flags.

    Args:
        behaviors: What :func:`~lightning_bn.functional.describe` gave.
        statuses: Who froze which layer, by name; None if nobody asks.
        others: What has running statistics and is not torch's BatchNorm, by name.
    """
    training, kinds = sum(layer.training for layer in behaviors), {layer.name: layer.kind for layer in behaviors}
    layers = counted(len(behaviors), f"{one_kind(kinds)} layer")
    columns = [
        Column("channels", 6, "right"),
        Column("mode", 1),
        Column("normalizes with", 3),
        Column("running statistics", 2),
        Column("updates", 5, "right"),
        Column("weight, bias", 4),
    ]
    surprises = [f"{_name(layer)}: {surprise}." for layer in behaviors for surprise in layer.surprises]
    table = LayerTable(
        f"{layers}, {training} in train mode: what the next forward does",
        columns,
        below=[*surprises, *kinds_line(kinds), *not_listed(others)],
    )
    for layer in behaviors:
        status = (statuses or {}).get(layer.name, LayerStatus())
        table.add_row(
            layer.name,
            f"{layer.channels:,}",
            "train" if layer.training else "eval",
            _normalizes_with(layer),
            _running(layer, status),
            "-" if layer.num_batches_tracked is None else f"{layer.num_batches_tracked:,}",
            _affine(layer, status),
            style="yellow" if layer.surprises else "",
        )
    return table


def print_plan(plan: FreezePlan, console: Console | None = None) -> None:
    """Print what a freeze will do, one BatchNorm layer a line.

    Args:
        plan: What :func:`~lightning_bn.functional.plan` or ``BatchNormFreezer.plan`` gave.
        console: Where to; None for standard output.
    """
    (console or Console()).print(plan_table(plan))


def plan_table(plan: FreezePlan) -> LayerTable:
    """What a freeze will do, as a table: each layer, the rule that selected it, what is frozen and when.

    Args:
        plan: What :func:`~lightning_bn.functional.plan` or ``BatchNormFreezer.plan`` gave.
    """
    verb = "trains" if plan.others == 1 else "train"
    others = f"{counted(plan.others, 'other weight')} below the same paths still {verb}: only BatchNorm is frozen."
    kinds = {
        layer.name: layer.kind if layer.processes == 1 else f"{layer.kind} over {layer.processes} processes"
        for layer in plan.layers
    }
    rules = Counter(layer.rule for layer in plan.frozen)
    selected = ", ".join(f"{rule} ({counted(number, 'layer')})" for rule, number in rules.items())
    columns = [Column("selected by", 2, instead=f"Selected by: {selected}." if selected else ""), Column("frozen", 1)]
    by_task: dict[str, list[str]] = {}
    for layer in plan.frozen:
        if layer.tasks:
            by_task.setdefault(", ".join(layer.tasks), []).append(layer.name)
    if by_task:
        of_tasks = "; ".join(f"{tasks}: {paths_of(names, kinds)}" for tasks, names in by_task.items())
        columns.append(Column("in batches of", 3, instead=f"Only in batches of a task: {of_tasks}."))
    when = "" if plan.schedule.always else f" {plan.schedule}"
    title = f"{len(plan.frozen)} of {counted(len(plan.layers), f'{one_kind(kinds)} layer')} will be frozen{when}"
    table = LayerTable(title, columns, below=[*([others] if plan.others else []), *kinds_line(kinds)])
    for layer in plan.layers:
        what = ", ".join(word for word, on in (("statistics", layer.stats), ("affine", layer.affine)) if on)
        tasks = f"task {', '.join(layer.tasks)}" if layer.tasks else "all tasks" if layer.frozen else ""
        table.add_row(
            layer.name,
            layer.rule or "no rule",
            what if layer.frozen else "nothing",
            *([tasks] if by_task else []),
            style="" if layer.frozen else "dim",
        )
    return table


def _normalizes_with(layer: LayerBehavior) -> str:
    return batch_of(layer) if layer.normalizes_with == "batch" and layer.training else layer.normalizes_with


def _name(layer: LayerBehavior) -> str:
    return layer.name or "(the model itself)"


def _running(layer: LayerBehavior, status: LayerStatus) -> str:
    if layer.averaging == "exponential":
        return f"move by {layer.momentum:.3g}"
    if layer.averaging == "cumulative":
        return "average all"
    if layer.num_batches_tracked is None:
        return "none"
    return "frozen" if status.stats_frozen_by else "do not move"


def _affine(layer: LayerBehavior, status: LayerStatus) -> str:
    if not layer.affine:
        return "none"
    if status.affine_frozen_by:
        return "frozen"
    return "train" if layer.affine_trainable else "do not train"
