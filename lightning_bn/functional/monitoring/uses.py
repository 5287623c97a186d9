"""Several uses of a layer in one step, seen one by one: do they see the same inputs?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.functional.statistics.snapshots import Snapshot


class Uses:
    """Running means after each use of some layers, while a batch is judged.

    Of an exponential average, the mean of each use's batch follows from two of them: (after - before) / m + before.
    Nothing is seen of layers inside compiled code, which does not run hooks that were added later.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], names: Collection[str]) -> None:
        self._seen: dict[str, list[Tensor]] = {name: [] for name in names}
        self._hooks: list[RemovableHandle] = [
            layers[name].register_forward_hook(partial(self._see, name)) for name in names
        ]

    def _see(self, name: str, layer: nn.Module, *_: object) -> None:
        mean = layer.running_mean
        if layer.training and isinstance(mean, Tensor) and not torch.compiler.is_compiling():
            self._seen[name].append(mean.detach().clone())

    def end(self) -> None:
        """Look no further."""
        while self._hooks:
            self._hooks.pop().remove()

    def apart(self, before: Snapshot, layers: Mapping[str, _BatchNorm]) -> Tensor:
        """Return how far the second use lay from the first, ``(C,)``, in standard deviations; NaN where there is none.

        Args:
            before: The statistics before the batch, of all layers.
            layers: All of them.
        """
        sigma = (before.var.double() + before.eps_of()).sqrt()
        found = torch.full_like(sigma, torch.nan)
        for name, means in self._seen.items():
            momentum, part = layers[name].momentum, before.layout.slices[name]
            if len(means) > 1 and momentum:
                start, one, two = before.mean[part].double(), means[0].double(), means[1].double()
                first, second = (start + (one - start) / momentum, one + (two - one) / momentum)
                found[part] = (second - first) / sigma[part]
        return found
