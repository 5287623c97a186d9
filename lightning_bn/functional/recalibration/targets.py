"""Which of the selected layers a recalibration rewrites: the one place with the rule of what counts as frozen."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.status import is_frozen
from lightning_bn.functional.recalibration.result import AllFrozenError


def targets_of(model: nn.Module, selected: Mapping[str, _BatchNorm], *, distributed: bool) -> dict[str, _BatchNorm]:
    """Return the selected layers that are not frozen; eval says frozen only where something else is in training.

    Args:
        model: Whole, since its other modules tell what eval means.
        selected: Layers with running statistics, by name.
        distributed: Whether all processes take part.

    Raises:
        AllFrozenError: If none is left.
        ValueError: If a layer is synchronized over processes that do not take part.
    """
    in_training = any(module.training for module in model.modules())
    targets = {
        name: layer for name, layer in selected.items() if not is_frozen(layer) and (layer.training or not in_training)
    }
    if not targets:
        raise AllFrozenError(
            f"nothing to recalibrate: {counted(len(selected), 'selected BatchNorm layer')}, every one frozen or in "
            f"eval inside a model in training ({quoted(list(selected))}). Unfreeze them, or call model.eval() if eval "
            f"was not meant to freeze them."
        )
    synchronized = [name for name, layer in targets.items() if processes_of(layer) > 1]
    if synchronized and not distributed:
        name = synchronized[0]
        more = f" (and {counted(len(synchronized) - 1, 'more layer')})" if len(synchronized) > 1 else ""
        raise ValueError(
            f"BatchNorm layer {name!r}{more} is synchronized over {processes_of(targets[name])} processes: each of its "
            f"forwards waits for theirs. Pass distributed=True, in every process."
        )
    return targets
