"""Several uses of a layer in one step, seen one by one: do they see the same inputs?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.functional.layers.sets_per_task import Statistics, StatisticsOf
from lightning_bn.functional.statistics.snapshots import Snapshot

_Use: TypeAlias = tuple[Tensor, Tensor | None, Tensor]
"""The running mean and the counter after a use, and the tensor that had the mean."""


class Uses:
    """Running means after each use of some layers, while a batch is judged.

    The mean of each use's batch follows from two of them: (after - before) / weight + before. Nothing is seen of layers
    inside compiled code, which does not run hooks that were added later.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], names: Collection[str]) -> None:
        self._seen: dict[str, list[_Use]] = {name: [] for name in names}
        self._hooks: list[RemovableHandle] = [
            layers[name].register_forward_hook(_Look(seen)) for name, seen in self._seen.items()
        ]

    def end(self) -> None:
        """Look no further."""
        while self._hooks:
            self._hooks.pop().remove()

    def apart(self, before: Snapshot, layers: Mapping[str, Statistics]) -> Tensor:
        """Return how far the use that is furthest from the first lay from it, ``(C,)``, in standard deviations.

        NaN where a layer was used once, or its weights are not known.

        Args:
            before: The statistics before the batch.
            layers: What they are of, some of the layers; of a task's statistics only its uses count.
        """
        sigma = (before.var.double() + before.eps_of()).sqrt()
        found = torch.full_like(sigma, torch.nan)
        for name, layer in layers.items():
            part, momentum = before.layout.slices[name], layer.momentum
            own = layer.running_mean if isinstance(layer, StatisticsOf) else None
            seen = [(mean, count) for mean, count, of in self._seen.get(name, ()) if own is None or of is own]
            if len(seen) < 2 or momentum == 0 or (momentum is None and seen[0][1] is None):
                continue
            last, batches = before.mean[part].double(), []
            for mean, count in seen:
                # A cumulative average takes the n-th batch with a weight of 1 / n.
                share = momentum if momentum is not None else 1 / count.double()  # type: ignore[union-attr]
                batches.append(last + (mean.double() - last) / share)
                last = mean.double()
            distances = torch.stack(batches[1:]) - batches[0]
            found[part] = distances[distances.square().mean(1).argmax()] / sigma[part]
        return found


class _Look:
    """The hook of one layer; a copy of the layer takes none along."""

    def __init__(self, seen: list[_Use] | None = None) -> None:
        self._seen = seen

    def __call__(self, layer: nn.Module, *_: object) -> None:
        mean, count = layer.running_mean, layer.num_batches_tracked
        if self._seen is not None and layer.training and isinstance(mean, Tensor) and not torch.compiler.is_compiling():
            counted = count.detach().clone() if isinstance(count, Tensor) else None
            self._seen.append((mean.detach().clone(), counted, mean))

    def __deepcopy__(self, memo: object) -> _Look:
        return _Look()

    def __reduce__(self) -> tuple[type[_Look], tuple[()]]:
        return (_Look, ())
