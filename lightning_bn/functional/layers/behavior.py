"""What one BatchNorm layer's next forward does, as the layer stands now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.properties import affine_parameters, has_running_statistics, is_lazy, processes_of
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.layers.sets_per_task import Statistics


@dataclass(frozen=True)
class LayerBehavior:
    """What the next forward of one layer does.

    Attributes:
        name: Canonical name.
        kind: Name of the layer's class.
        channels: Number of features.
        training: The layer's own flag.
        normalizes_with: ``"batch"``: mean and biased variance of the batch; ``"running"``: the running statistics.
        updates_running: Whether the running statistics move.
        averaging: How they move: ``"exponential"``, ``"cumulative"``, or ``"none"`` if they do not.
        momentum: Weight of the new batch; None for the cumulative average.
        processes: How many processes' batches it normalizes together in training: 1 unless it is synchronized.
        affine: Whether it has ``weight`` and ``bias``.
        affine_trainable: Whether either of them requires a gradient.
        num_batches_tracked: Updates so far; None without the counter.
        surprises: What a reader of the model's code would not expect, as plain sentences.
    """

    name: str
    kind: str
    channels: int
    training: bool
    normalizes_with: Literal["batch", "running"]
    updates_running: bool
    averaging: Literal["exponential", "cumulative", "none"]
    momentum: float | None
    processes: int
    affine: bool
    affine_trainable: bool
    num_batches_tracked: int | None
    surprises: tuple[str, ...]


def describe(
    model: nn.Module, modules: Patterns = None, *, exclude: Patterns = None, root: str = ""
) -> list[LayerBehavior]:
    """Return what the next forward of each selected BatchNorm layer does; nothing is run and nothing changes.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.

    Raises:
        SelectionError: As for ``batch_norm_layers``.

    Source: ``torch.nn.modules.batchnorm``; Ioffe & Szegedy (2015), arXiv 1502.03167, algorithms 1 and 2.

    Example:
        >>> [layer] = describe(nn.BatchNorm2d(3).eval())
        >>> layer.normalizes_with, layer.updates_running
        ('running', False)
        >>> layer.surprises[0]
        'evaluates with the initial statistics, mean 0 and variance 1: it has never seen a batch in training mode'
    """
    return describe_layers(LayerSelection(modules, exclude, root).layers(model))


def describe_layers(layers: Mapping[str, _BatchNorm]) -> list[LayerBehavior]:
    """As :func:`describe`, of layers that are already resolved."""
    return [_describe(name, layer) for name, layer in layers.items()]


def _describe(name: str, layer: _BatchNorm) -> LayerBehavior:
    buffers = has_running_statistics(layer)
    averaging = _averaging(layer)
    counter = layer.num_batches_tracked
    return LayerBehavior(
        name=name,
        kind=type(layer).__name__,
        channels=layer.num_features,
        training=layer.training,
        normalizes_with="batch" if layer.training or not buffers else "running",
        updates_running=averaging != "none",
        averaging=averaging,
        momentum=layer.momentum,
        processes=processes_of(layer),
        affine=bool(affine_parameters(layer)),
        affine_trainable=any(parameter.requires_grad for parameter in affine_parameters(layer)),
        num_batches_tracked=None if counter is None or is_lazy(counter) else int(counter),
        surprises=tuple(_surprises(layer, averaging)),
    )


def _averaging(layer: _BatchNorm) -> Literal["exponential", "cumulative", "none"]:
    if not (layer.training and layer.track_running_stats and has_running_statistics(layer)):
        return "none"
    if layer.momentum is None:
        # Without the counter torch leaves the factor of the cumulative average at 0.
        return "none" if layer.num_batches_tracked is None else "cumulative"
    return "none" if layer.momentum == 0 else "exponential"


def _surprises(layer: _BatchNorm, averaging: str) -> list[str]:
    found: list[str] = []
    if not has_running_statistics(layer):
        if not layer.training:
            found.append("has no running statistics: an output depends on the rest of its batch, in evaluation too")
        if layer.track_running_stats:
            found.append("track_running_stats is on but there are no running statistics to track")
        return found
    if not layer.track_running_stats:
        found.append(
            "track_running_stats was switched off after construction: training normalizes with the batch and no "
            "longer updates the running statistics that evaluation uses, so that train and eval disagree"
        )
    elif layer.training and layer.momentum == 0:
        found.append(
            "momentum is 0: training normalizes with the batch, but never updates the running statistics that "
            "evaluation uses"
        )
    elif layer.training and layer.momentum == 1:
        found.append("momentum is 1: the running statistics are those of the last batch alone")
    elif layer.training and averaging == "none":
        found.append("momentum is None but num_batches_tracked is missing: the cumulative average never moves")
    affine = affine_parameters(layer)
    if averaging != "none" and affine and not any(parameter.requires_grad for parameter in affine):
        found.append("weight and bias do not require a gradient, but the running statistics still move in training")
    if not layer.training and has_initial_statistics(layer):
        found.append(
            "evaluates with the initial statistics, mean 0 and variance 1: it has never seen a batch in training mode"
        )
    bad = nonfinite_channels(layer)
    if bad:
        found.append(
            f"running statistics of {bad} of {layer.num_features} channels are not finite: a moving average never "
            "becomes finite again, so reset or recalibrate the layer"
        )
    return found


def has_initial_statistics(layer: Statistics) -> bool:
    """Whether the running statistics are those of construction, never updated: mean 0, variance 1, count 0."""
    mean, var, counter = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or counter is None or is_lazy(mean):
        return False
    return int(counter) == 0 and not bool(mean.count_nonzero()) and bool((var == 1).all())


def nonfinite_channels(layer: _BatchNorm) -> int:
    """How many channels have running statistics that are not finite."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or is_lazy(mean):
        return 0
    return int((~(mean.isfinite() & var.isfinite())).sum())
