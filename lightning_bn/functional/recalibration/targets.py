"""Which of the selected layers a recalibration rewrites: the one place with the rule of what counts as frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import counted, named, quoted
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.status import is_frozen
from lightning_bn.functional.recalibration.result import AllFrozenError


def targets_of(
    modules: Collection[nn.Module], selected: Mapping[str, _BatchNorm], *, distributed: bool
) -> dict[str, _BatchNorm]:
    """Return the layers to be rewritten, by name: eval counts as frozen where something else is in training.

    Args:
        modules: All of the model.
        selected: Layers among them.
        distributed: Whether all processes take part.

    Raises:
        AllFrozenError: If there is none.
        ValueError: If one is synchronized and ``distributed`` is not set.
    """
    in_training = any(module.training for module in modules)
    targets = {
        name: layer for name, layer in selected.items() if not is_frozen(layer) and (layer.training or not in_training)
    }
    if not targets:
        raise AllFrozenError(
            f"nothing to recalibrate: {counted(len(selected), 'selected BatchNorm layer')}, all frozen or in eval "
            f"inside a model in training ({quoted(list(selected))}). {_unfreeze(modules, selected)}"
        )
    synchronized = [name for name, layer in targets.items() if processes_of(layer) > 1]
    if synchronized and not distributed:
        name = synchronized[0]
        more = f" (and {counted(len(synchronized) - 1, 'more layer')})" if len(synchronized) > 1 else ""
        raise ValueError(
            f"BatchNorm layer {named(name)}{more} is synchronized over {processes_of(targets[name])} processes, whose "
            "forwards wait for each other. Pass distributed=True, in every process."
        )
    return targets


def _unfreeze(modules: Iterable[nn.Module], layers: Mapping[str, _BatchNorm]) -> str:
    """How layers that are all frozen can be recalibrated."""
    own = {id(layer) for layer in layers.values()}
    # Fused convolutions of quantization-aware training keep the flag of torch's freeze_bn_stats.
    if any(
        getattr(module, "freeze_bn", False) is True and id(getattr(module, "bn", None)) in own for module in modules
    ):
        return "torch's freeze_bn_stats froze them: model.apply(torch.ao.nn.intrinsic.qat.update_bn_stats) first."
    return "Unfreeze them, or call model.eval() if eval was not meant to freeze them."
