"""What is refused or warned of before any layer is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._checks import check_flag
from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.layers.behavior import has_initial_statistics
from lightning_bn.functional.layers.patterns import SelectionError
from lightning_bn.functional.layers.properties import has_running_statistics
from lightning_bn.functional.layers.selection import LayerSelection, refuse_lazy


def check_freezes(*, stats: bool, affine: bool) -> None:
    """Raise if nothing is to be frozen.

    Raises:
        ValueError: If neither ``stats`` nor ``affine`` is asked for, or one of them is neither True nor False.
    """
    check_flag("stats", stats)
    check_flag("affine", affine)
    if not stats and not affine:
        raise ValueError("stats=False with affine=False freezes nothing: ask for at least one of them.")


def are_constants(*, stats: bool, affine: bool, memory_efficient: bool | None) -> bool:
    """Whether layers frozen with these arguments are constants, and keep nothing of their inputs for the backward.

    Raises:
        ValueError: If ``memory_efficient`` asks for what the others do not allow.
    """
    check_flag("memory_efficient", memory_efficient, none="to use it where stats and affine are frozen")
    both = stats and affine
    if memory_efficient and not both:
        trained = "affine" if stats else "stats"
        raise ValueError(
            f"memory_efficient=True with {trained}=False: to train this part, the backward needs the layer's input. "
            "Freeze both stats and affine, or leave memory_efficient out."
        )
    return both and memory_efficient is not False


def select_to_freeze(
    model: nn.Module, selection: LayerSelection, *, stats: bool, affine: bool
) -> dict[str, _BatchNorm]:
    """Return the layers that a freeze with these arguments means, checked: nothing is changed.

    Raises:
        SelectionError: As for :func:`~lightning_bn.functional.freeze_batch_norm`.
        ValueError: As for :func:`~lightning_bn.functional.freeze_batch_norm`.
    """
    check_freezes(stats=stats, affine=affine)
    layers = selection.layers(model)
    if not stats:
        return layers
    without = [name for name, layer in layers.items() if not has_running_statistics(layer)]
    if without:
        raise SelectionError(
            f"BatchNorm layer {quoted(without)} has no running statistics to freeze (constructed with "
            "track_running_stats=False). Leave it out with exclude, or freeze with stats=False."
        )
    refuse_lazy(layers)
    return layers


def warn_of_initial_statistics(layers: Mapping[str, _BatchNorm], stacklevel: int = 3) -> None:
    """Warn where statistics are about to be frozen that are still those of construction."""
    initial = [name for name, layer in layers.items() if has_initial_statistics(layer)]
    if initial:
        warnings.warn(
            f"freezing {counted(len(initial), 'BatchNorm layer')} with their initial running statistics, mean 0 and "
            f"variance 1: {quoted(initial)}. A layer that is frozen with these does not normalize: load the "
            "pre-trained weights before freezing, or recalibrate first.",
            stacklevel=stacklevel,
        )
