"""Running statistics lent to layers for a while, so that what a backward reads is what its forward used."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.freezing.verification import Moved, what_moved

_LENT = ("running_mean", "running_var", "num_batches_tracked")


class LentStatistics:
    """Copies of the statistics of ``layers`` in the place of their own, from construction to :meth:`take_back`.

    In eval mode torch's batch_norm keeps the running statistics for its backward by reference, and a forward in train
    mode moves them without telling autograd. Where one layer is held for a part of a step and trained in another, the
    first part's gradients would be wrong without an error.

    Args:
        layers: By name; each with running statistics.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._own: list[tuple[str, _BatchNorm, dict[str, Tensor], dict[str, Tensor]]] = []
        for name, layer in layers.items():
            own = {key: buffer for key in _LENT if (buffer := layer._buffers[key]) is not None}
            lent = {key: buffer.clone() for key, buffer in own.items()}
            layer._buffers.update(lent)
            self._own.append((name, layer, own, lent))

    def take_back(self) -> list[Moved]:
        """Gives the layers their own tensors back; what was done to the copies is told and has no effect."""
        moved = []
        for name, layer, own, lent in self._own:
            # A forward in train mode leaves a version on the counter only.
            touched = any(layer._buffers.get(key) is not lent[key] or lent[key]._version for key in own)
            for key, buffer in own.items():
                moved += what_moved((name, key), buffer, layer._buffers.get(key)) if touched else []
                layer._buffers[key] = buffer
        self._own = []
        return moved
