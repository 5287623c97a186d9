"""Values that must not change: copied, watched, compared bit by bit, restored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._bits import Flat, same_bits
from lightning_bn.functional.freezing.change import Change, changes_of
from lightning_bn.functional.layers.sets_per_task import sets_of
from lightning_bn.functional.layers.torch_private import AFFINE, STATISTICS, places_of


class Baseline:
    """Copies of the values of ``layers`` that must not change.

    Whether a value was *touched* is known from its identity and version without looking at the device; whether it
    *changed* takes a comparison of all bits. Some writers leave no version behind (``tensor.data.copy_``), so that the
    second is not answered by the first.

    Args:
        layers: By name.
        stats: Whether running statistics and ``num_batches_tracked`` are among the values.
        affine: Whether ``weight`` and ``bias`` are.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], *, stats: bool, affine: bool) -> None:
        self._layers = dict(layers)
        self._stats, self._affine = stats, affine
        # Also when nobody else knows of them any more.
        self._sets = {name: sets_of(layer) for name, layer in layers.items()}
        self.rearm()
        self._keys = [key for key, *_ in self._values()]
        self._copies = Flat([tensor for _, _, tensor, _ in self._watched])

    def touched(self) -> bool:
        """Whether any value was written to or replaced since it was last compared; costs no look at the device."""
        # Plain tuples in a plain loop: this runs in every training step.
        for home, key, tensor, version in self._watched:
            if home.get(key) is not tensor or tensor._version != version:
                return True
        return False

    def changes(self) -> list[Change]:
        """Return what differs in any bit from the copies; a few vector operations where nothing does."""
        now = {key: tensor for key, _, _, tensor in self._values()}
        if list(now) == self._keys and self._copies.same_bits(list(now.values())):
            return []
        copies = zip(self._keys, self._copies.parts(), strict=True)
        return [change for key, copy in copies for change in changes_of(key, copy, now.get(key))]

    def restore(self) -> None:
        """Write the copies wherever something differs, in place; a tensor taken away or reshaped comes back."""
        with torch.no_grad():
            for (home, key, tensor, _), copy in zip(self._watched, self._copies.parts(), strict=True):
                now = home.get(key)
                if now is None or now.shape != tensor.shape or now.dtype != tensor.dtype:
                    # The tensor it was: optimizers and others may still refer to it.
                    home[key] = now = tensor
                if not same_bits(now.reshape(-1), copy):
                    now.copy_(copy.view_as(now))
        self.rearm()

    def digests(self) -> dict[str, str]:
        """Return by layer a digest of the values that are expected of it."""
        found = {name: hashlib.sha256() for name in self._layers}
        for (name, value), copy in zip(self._keys, self._copies.parts(), strict=True):
            found[name].update(value.encode() + copy.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {name: digest.hexdigest() for name, digest in found.items()}

    def rearm(self) -> None:
        """Take what is there now as untouched."""
        self._watched = [(home, key, tensor, tensor._version) for _, home, key, tensor in self._values()]

    def for_layers(self, layers: Mapping[str, _BatchNorm]) -> Baseline:
        """Return a baseline of these layers that expects of them what this one expects of layers of the same names.

        A value of another size or name has nothing to be compared with: what it is now is expected.
        """
        others = Baseline(layers, stats=self._stats, affine=self._affine)
        mine = dict(zip(self._keys, self._copies.parts(), strict=True))
        expected = []
        for key, now in zip(others._keys, others._copies.parts(), strict=True):
            copy = mine.get(key, now)
            expected.append(copy if copy.shape == now.shape and copy.dtype == now.dtype else now)
        others._copies = Flat(expected)
        return others

    def _values(self) -> Iterator[tuple[tuple[str, str], dict[str, Any], str, Tensor]]:
        """Yield the names of layer and value, where the value is, and the value, for all that are there."""
        names = (STATISTICS if self._stats else ()) + (AFFINE if self._affine else ())
        for name, layer in self._layers.items():
            for value, home, key in places_of(layer, names):
                # Of every task, and whichever lies in the layer now.
                sets = self._sets[name] if value in STATISTICS else None
                for task in (None,) if sets is None else sets.tasks:
                    of_task = home if sets is None or task is None else sets.home_of(layer, task)
                    if (tensor := of_task.get(key)) is not None:
                        own = task is None or (sets is not None and task == sets.default)
                        yield (name, value if own else f"{value} of task {task!r}"), of_task, key, tensor
