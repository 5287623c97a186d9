"""Drift layer by layer as a table that a person reads: what to do, then the layers, the worst first."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn._kinds import kinds_line, not_listed, one_kind, paths_of
from lightning_bn._tables import Column, LayerTable
from lightning_bn.functional._text import counted
from lightning_bn.functional.layers.behavior import LayerBehavior, describe_layers
from lightning_bn.functional.layers.status import LayerStatus
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.session import MonitorSession
from lightning_bn.functional.statistics.drift_measures import Measure, of_standardized, standardized
from lightning_bn.functional.statistics.snapshots import Snapshot


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
    to_do: Sequence[str] = (),
) -> LayerTable:
    """Drift layer by layer, the worst first, as a person reads it; frozen layers that did not move are one line.

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
        to_do: Sentences that stand above the layers.
    """
    shift, ratio = standardized(reference, current)
    values = of_standardized(measure, shift, ratio, current.weight).abs().nan_to_num(nan=torch.inf)
    rates = dict(zip(current.names, updates, strict=True))
    layers = {layer.name: layer for layer in behaviors}
    # Not those that have left the model since.
    parts = {name: part for name, part in current.layout.slices.items() if name in layers}
    worst = {name: int(values[part].argmax()) + part.start for name, part in parts.items()}
    frozen_by = {name: ", ".join(status.stats_frozen_by) for name, status in (statuses or {}).items()}
    frozen_by = {name: by for name, by in frozen_by.items() if by and name in parts}
    still = {name: by for name, by in frozen_by.items() if _unmoved(shift[parts[name]], ratio[parts[name]])}
    order = sorted((name for name in worst if name not in still), key=lambda name: -float(values[worst[name]]))
    shown, rest = order[:most], len(order) - most
    frozen_column = any(name in frozen_by for name in shown)
    columns = [
        Column("trains with", 5),
        Column("evaluates with", 8),
        *([Column("frozen by", 6)] if frozen_column else []),
        Column("updates per batch", 7, "right"),
        Column("mean shift, sigma", 2, "right"),
        Column("variance", 3, "right"),
        Column(measure.replace("_", " "), 1, "right"),
        Column("history", 4),
    ]
    kinds = {layer.name: layer.kind for layer in behaviors if layer.name in parts}
    title = f"Running statistics of {counted(len(parts), f'{one_kind(kinds)} layer')}, the worst first ({measure})"
    said = [f"... {rest} more that moved less"] * (rest > 0) + _frozen_lines(still, parts)
    table = LayerTable(title, columns, _first(to_do), said + kinds_line(kinds) + not_listed(others))
    curves = dict(zip(history.names, history.values().T.tolist(), strict=True)) if len(history) else {}
    for name in shown:
        layer, at = layers[name], worst[name]
        trains = (training or {}).get(name, layer.training)
        found = (f"{shift[at]:+.2f}", _times(float(ratio[at])), f"{values[at]:.2g}")
        table.add_row(
            name,
            "running" if name in frozen_by or not trains else batch_of(layer),
            "batch" if layer.num_batches_tracked is None and layer.normalizes_with == "batch" else "running",
            *([frozen_by.get(name, "-")] if frozen_column else []),
            "-" if math.isnan(rates[name]) else f"{rates[name]:.2g}",
            *(("-", "-", "not yet") if name in warming_up else found),
            sparkline(curves.get(name, []), width=7),
        )
    return table


def session_table(
    session: MonitorSession,
    layers: Mapping[str, _BatchNorm],
    others: Mapping[str, nn.Module],
    measure: Measure,
    most: int,
) -> LayerTable:
    """What a session has said so far, then drift at its last sample, of which there is one.

    Args:
        session: During a fit or after it.
        layers: By name; some of those measured may have left the model.
        others: What has running statistics and is not torch's BatchNorm, by name.
        measure: The session's.
        most: How many layers to show.
    """
    assert session.last is not None
    own = session.own
    return drift_table(
        describe_layers(layers),
        own.reference,
        own.sampled,
        own.history,
        session.last.updates,
        measure,
        session.statuses,
        session.training,
        own.warm_up.layers,
        others,
        most=most,
        to_do=session.said,
    )


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


def batch_of(layer: LayerBehavior) -> str:
    """Return over which batch a layer normalizes that does so with the batch's statistics."""
    return "batch" if layer.processes == 1 else f"batch of {layer.processes} processes"


def _first(to_do: Sequence[str]) -> list[str]:
    return ["What to do:", *(f"- {sentence}" for sentence in to_do)] if to_do else []


def _unmoved(shift: Tensor, ratio: Tensor) -> bool:
    return not bool(shift.count_nonzero()) and bool((ratio == 1).all())


def _frozen_lines(still: Mapping[str, str], everything: Mapping[str, object]) -> list[str]:
    """Frozen layers that did not move, one line for each who froze some."""
    lines = []
    for by in dict.fromkeys(still.values()):
        names = [name for name in still if still[name] == by]
        lines.append(f"Frozen by {by}, did not move: {paths_of(names, everything)} ({counted(len(names), 'layer')})")
    return lines


def _times(ratio: float) -> str:
    return f"x{ratio:.2f}" if 0.095 <= ratio < 9.95 else f"x{ratio:.2g}"
