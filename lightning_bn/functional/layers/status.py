"""What is known of a layer: who froze it, and at which step it was recalibrated.

Callbacks do not know each other; what one must know of another stands here. The record lies on the layer itself, so it
is found from any parent and under any name, and goes along with deepcopy and pickling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.torch_private import attributes_of

_ATTRIBUTE = "_lightning_bn_status"


@dataclass(frozen=True)
class LayerStatus:
    """What is known of one layer.

    Attributes:
        stats_frozen_by: Who keeps its running statistics fixed; empty if nobody does.
        affine_frozen_by: Who keeps ``weight`` and ``bias`` fixed.
        recalibrated_at: The optimizer step at which its statistics were last recalibrated, None if never.
    """

    stats_frozen_by: tuple[str, ...] = ()
    affine_frozen_by: tuple[str, ...] = ()
    recalibrated_at: int | None = None


_NOTHING = LayerStatus()


def layer_status(layer: _BatchNorm) -> LayerStatus:
    """Return what is known of ``layer``; the empty status if nothing is."""
    status = attributes_of(layer).get(_ATTRIBUTE)
    return status if isinstance(status, LayerStatus) else _NOTHING


def update_status(layer: _BatchNorm, **changes: Any) -> None:
    """Record something of ``layer``; a status that says nothing leaves no trace on it."""
    status = replace(layer_status(layer), **changes)
    if status == _NOTHING:
        attributes_of(layer).pop(_ATTRIBUTE, None)
    else:
        attributes_of(layer)[_ATTRIBUTE] = status


def status_by_name(model: nn.Module) -> dict[str, LayerStatus]:
    """Return what is known of every BatchNorm layer of ``model``, by canonical name.

    Raises:
        SelectionError: If the model has no BatchNorm layer.
    """
    return {name: layer_status(layer) for name, layer in batch_norm_layers(model).items()}


def is_frozen(layer: _BatchNorm) -> bool:
    """Whether the running statistics of ``layer`` are frozen through this package."""
    return bool(layer_status(layer).stats_frozen_by)
