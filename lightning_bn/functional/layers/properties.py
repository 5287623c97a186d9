"""What kind of BatchNorm layer one is: lazy, synchronized, with statistics, with affine parameters."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # its stub lacks it

from lightning_bn.functional.layers.torch_private import AFFINE, places_of


def is_lazy(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a lazy layer that has not seen a batch yet."""
    return isinstance(tensor, UninitializedTensorMixin)


def has_running_statistics(layer: _BatchNorm) -> bool:
    """Whether the layer holds running statistics as buffers, whatever its flags say."""
    return layer.running_mean is not None and layer.running_var is not None


def processes_of(layer: _BatchNorm) -> int:
    """How many processes' batches a layer normalizes together in training: 1 unless it is synchronized.

    Its group's size; None for a group means all processes.
    """
    # -1 in a process that is not in the group.
    return max(dist.get_world_size(layer.process_group), 1) if is_synchronized(layer) else 1  # type: ignore[arg-type]


def is_synchronized(layer: _BatchNorm) -> bool:
    """Whether a layer's forward in train mode waits for other processes, if its group has any.

    SyncBatchNorm and layers of its kind have the ``process_group`` that they communicate in.
    """
    # In this order: an attribute that a layer lacks takes long to be missed.
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return isinstance(layer, nn.SyncBatchNorm) or hasattr(layer, "process_group")


def affine_parameters(layer: _BatchNorm) -> list[nn.Parameter]:
    """The layer's ``weight`` and ``bias``, those it has; of a parametrized one, the parameters it is computed from."""
    found = [home[key] for _, home, key in places_of(layer, AFFINE) if key in home]
    return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]
