"""Tables that a person reads, made of what the ground floor returns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_bn.functional.patterns import Patterns
from lightning_bn.functional.semantics import LayerBehaviour, describe
from lightning_bn.functional.status import LayerStatus, status_by_name


def print_behaviour(
    model: nn.Module,
    modules: Patterns = None,
    exclude: Patterns = None,
    root: str = "",
    console: Console | None = None,
) -> None:
    """Prints what the next forward of each selected BatchNorm layer does, one layer a line.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.
        console: Where to; None for standard output.

    Raises:
        SelectionError: As for ``batch_norm_layers``.
    """
    table = behaviour_table(describe(model, modules, exclude, root), status_by_name(model))
    (console or Console()).print(table)


def behaviour_table(behaviours: Sequence[LayerBehaviour], statuses: dict[str, LayerStatus] | None = None) -> Table:
    """What each layer's next forward does, as a table that can be read without knowing torch's flags.

    Args:
        behaviours: What :func:`~lightning_bn.functional.describe` gave.
        statuses: Who froze which layer, by name; None if nobody asks.
    """
    training = sum(layer.training for layer in behaviours)
    table = Table(
        title=f"{len(behaviours)} BatchNorm layers, {training} in train mode: what the next forward does",
        caption="\n".join(f"{_name(layer)}: {surprise}." for layer in behaviours for surprise in layer.surprises),
        caption_justify="left",
    )
    for heading, justify in (
        ("layer", "left"),
        ("kind", "left"),
        ("channels", "right"),
        ("mode", "left"),
        ("normalises with", "left"),
        ("running statistics", "left"),
        ("updates", "right"),
        ("weight, bias", "left"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for layer in behaviours:
        status = (statuses or {}).get(layer.name, LayerStatus())
        table.add_row(
            _name(layer),
            layer.kind,
            f"{layer.channels:,}",
            "train" if layer.training else "eval",
            layer.normalizes_with,
            _running(layer, status),
            "-" if layer.num_batches_tracked is None else f"{layer.num_batches_tracked:,}",
            _affine(layer, status),
            style="yellow" if layer.surprises else None,
        )
    return table


def _name(layer: LayerBehaviour) -> str:
    return layer.name or "(the model itself)"


def _running(layer: LayerBehaviour, status: LayerStatus) -> str:
    if layer.averaging == "exponential":
        return f"take {layer.momentum:.3g} of each batch"
    if layer.averaging == "cumulative":
        return "average of all batches"
    if layer.num_batches_tracked is None:
        return "none"
    return "frozen" if status.stats_frozen_by else "do not move"


def _affine(layer: LayerBehaviour, status: LayerStatus) -> str:
    if not layer.affine:
        return "none"
    if status.affine_frozen_by:
        return "frozen"
    return "train" if layer.affine_trainable else "do not train"
