"""Tables that a person reads, made of what the ground floor returns."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import nn

from lightning_bn._tables import plain_table
from lightning_bn._task_table import task_drift_table
from lightning_bn.functional._text import counted
from lightning_bn.functional.freezing.freeze_plan import FreezePlan
from lightning_bn.functional.layers.behavior import LayerBehavior, describe
from lightning_bn.functional.layers.names import kind_of
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.layers.status import LayerStatus, status_by_name
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.statistics.drift_measures import Measure, of_standardized, standardized
from lightning_bn.functional.statistics.snapshots import Snapshot

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
) -> Table:
    """What each layer's next forward does, as a table that can be read without knowing torch's flags.

    Args:
        behaviors: What :func:`~lightning_bn.functional.describe` gave.
        statuses: Who froze which layer, by name; None if nobody asks.
        others: What has running statistics and is not torch's BatchNorm, by name.
    """
    training = sum(layer.training for layer in behaviors)
    title = f"{len(behaviors)} BatchNorm layers, {training} in train mode: what the next forward does"
    surprises = [f"{_name(layer)}: {surprise}." for layer in behaviors for surprise in layer.surprises]
    surprises += _not_listed(others)
    # One cell, so that a narrow terminal breaks between the two.
    columns = [Column("layer and kind", overflow="fold", min_width=_widest(behaviors))]
    for heading in ("channels", "mode", "normalizes with", "running statistics", "updates", "weight, bias"):
        numbers = heading in ("channels", "updates")
        # "train" is longer than "mode".
        width = max(_longest_word(heading), len("train"))
        columns.append(Column(heading, justify="right" if numbers else "left", min_width=width))
    table = plain_table(title, "\n".join(surprises), columns, padding=(0, 1, 0, 0))
    for layer in behaviors:
        status = (statuses or {}).get(layer.name, LayerStatus())
        table.add_row(
            escape(f"{_name(layer)} {layer.kind}"),
            f"{layer.channels:,}",
            "train" if layer.training else "eval",
            _normalizes_with(layer),
            _running(layer, status),
            "-" if layer.num_batches_tracked is None else f"{layer.num_batches_tracked:,}",
            _affine(layer, status),
            style="yellow" if layer.surprises else None,
        )
    return table


def print_plan(plan: FreezePlan, console: Console | None = None) -> None:
    """Print what a freeze will do, one BatchNorm layer a line.

    Args:
        plan: What :func:`~lightning_bn.functional.plan` or ``BatchNormFreezer.plan`` gave.
        console: Where to; None for standard output.
    """
    (console or Console()).print(plan_table(plan))


def plan_table(plan: FreezePlan) -> Table:
    """What a freeze will do, as a table: each layer, the rule that selected it, what is frozen and when.

    Args:
        plan: What :func:`~lightning_bn.functional.plan` or ``BatchNormFreezer.plan`` gave.
    """
    verb = "trains" if plan.others == 1 else "train"
    others = f"{counted(plan.others, 'other weight')} below the same paths still {verb}"
    title = f"{len(plan.frozen)} of {counted(len(plan.layers), 'BatchNorm layer')} will be frozen"
    caption = f"{others}: only BatchNorm is frozen." if plan.others else None
    folded = [Column(heading, overflow="fold") for heading in ("layer", "kind", "selected by")]
    table = plain_table(title, caption, [*folded, Column("frozen"), Column("when")])
    for layer in plan.layers:
        what = ", ".join(word for word, on in (("statistics", layer.stats), ("affine", layer.affine)) if on)
        when = f"task {', '.join(layer.tasks)}; {plan.schedule}" if layer.tasks else str(plan.schedule)
        table.add_row(
            escape(layer.name or "(the model itself)"),
            layer.kind if layer.processes == 1 else f"{layer.kind} over {layer.processes} processes",
            escape(layer.rule or "no rule"),
            what if layer.frozen else "nothing",
            when if layer.frozen else "",
            style=None if layer.frozen else "dim",
        )
    return table


def drift_table(
    behaviors: Sequence[LayerBehavior],
    reference: Snapshot,
    current: Snapshot,
    history: DriftHistory,
    updates: Sequence[float],
    measure: Measure,
    statuses: dict[str, LayerStatus] | None = None,
    training: Mapping[str, bool] | None = None,
    warming_up: Collection[str] = (),
    others: Mapping[str, nn.Module] | None = None,
    most: int = 10,
) -> Table:
    """Drift layer by layer, the worst first, as a person reads it.

    Args:
        behaviors: Of the layers, as :func:`~lightning_bn.functional.describe` gives them.
        reference: What drift is measured from.
        current: The statistics now.
        history: Samples so far, for the little curves.
        updates: Of each layer per training batch; NaN where it is not known.
        measure: By which layers are ordered.
        statuses: Who froze which layer, by name.
        training: Whether each layer is in train mode in training, by name; None for what ``behaviors`` say.
        warming_up: Layers that are not measured yet.
        others: What has running statistics and is not torch's BatchNorm, by name.
        most: How many layers to show.
    """
    shift, ratio = standardized(reference, current)
    values = of_standardized(measure, shift, ratio, current.weight).abs().nan_to_num(nan=torch.inf)
    rates = dict(zip(current.names, updates, strict=True))
    layers = {layer.name: layer for layer in behaviors}
    worst = {name: int(values[part].argmax()) + part.start for name, part in current.layout.slices.items()}
    # Not those that have left the model since.
    order = sorted((name for name in worst if name in layers), key=lambda name: -float(values[worst[name]]))
    shown, rest = order[:most], len(order) - most
    frozen_by = {name: ", ".join(status.stats_frozen_by) for name, status in (statuses or {}).items()}
    anybody = any(frozen_by.get(name) for name in shown)
    columns = [Column("layer and kind", overflow="fold", min_width=min(_widest([layers[name] for name in shown]), 10))]
    for heading in ("trains with", "evaluates with", *(["frozen by"] if anybody else [])):
        columns.append(Column(heading, min_width=_longest_word(heading), overflow="fold"))
    for heading in ("updates per\nbatch", "mean shift, sigma", "variance", measure.replace("_", " ")):
        columns.append(Column(heading, justify="right", width=_longest_word(heading)))
    columns.append(Column("history", no_wrap=True, width=7))
    title = f"Running statistics of {counted(len(order), 'BatchNorm layer')}, the worst first ({measure})"
    said = [f"... {rest} more that moved less"] * (rest > 0) + _not_listed(others)
    table = plain_table(title, "\n".join(said) or None, columns, padding=0)
    curves = dict(zip(history.names, history.values().T.tolist(), strict=True)) if len(history) else {}
    for name in shown:
        layer, at = layers[name], worst[name]
        frozen = frozen_by.get(name, "")
        trains = (training or {}).get(name, layer.training)
        found = (f"{shift[at]:+.2f}", _times(float(ratio[at])), f"{values[at]:.2g}")
        table.add_row(
            escape(f"{_name(layer)} {layer.kind}"),
            "running" if frozen or not trains else _batch(layer),
            "batch" if layer.num_batches_tracked is None and layer.normalizes_with == "batch" else "running",
            *([frozen or "-"] if anybody else []),
            "-" if math.isnan(rates[name]) else f"{rates[name]:.2g}",
            *(("not", "yet", "-") if name in warming_up else found),
            sparkline(curves.get(name, []), width=7),
        )
    return table


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """A curve in one line of text; what is not finite is an exclamation mark.

    Example:
        >>> sparkline([0.0, 1.0, 2.0, 4.0])
        '▁▃▅█'
    """
    if not values:
        return ""
    bins = [values[index * len(values) // width] for index in range(width)] if len(values) > width else list(values)
    bins[-1] = values[-1]
    top = max((value for value in bins if math.isfinite(value)), default=0.0) or 1.0
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round(7 * max(value, 0.0) / top)] if math.isfinite(value) else "!" for value in bins)


def _not_listed(others: Mapping[str, nn.Module] | None) -> list[str]:
    kinds = [f"{name} ({kind_of(module)})" for name, module in (others or {}).items()]
    return [f"Not listed, since not torch's BatchNorm: {escape(', '.join(kinds))}."] if kinds else []


def _longest_word(heading: str) -> int:
    """As wide as a column has to be for nothing of its heading to be cut in the middle."""
    return max(map(len, heading.split()))


def _times(ratio: float) -> str:
    return f"x{ratio:.2f}" if 0.095 <= ratio < 9.95 else f"x{ratio:.2g}"


def _normalizes_with(layer: LayerBehavior) -> str:
    return _batch(layer) if layer.normalizes_with == "batch" and layer.training else layer.normalizes_with


def _batch(layer: LayerBehavior) -> str:
    return "batch" if layer.processes == 1 else f"batch of {layer.processes} processes"


def _name(layer: LayerBehavior) -> str:
    return layer.name or "(the model itself)"


def _widest(layers: Sequence[LayerBehavior]) -> int:
    """Wide enough for every name and kind to stay in one piece, as far as a terminal allows."""
    return min(max((max(len(_name(layer)), len(layer.kind)) for layer in layers), default=0), 28)


def _running(layer: LayerBehavior, status: LayerStatus) -> str:
    if layer.averaging == "exponential":
        return f"take {layer.momentum:.3g} of each batch"
    if layer.averaging == "cumulative":
        return "average of all batches"
    if layer.num_batches_tracked is None:
        return "none"
    return "frozen" if status.stats_frozen_by else "do not move"


def _affine(layer: LayerBehavior, status: LayerStatus) -> str:
    if not layer.affine:
        return "none"
    if status.affine_frozen_by:
        return "frozen"
    return "train" if layer.affine_trainable else "do not train"
