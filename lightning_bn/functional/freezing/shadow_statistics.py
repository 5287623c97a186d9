"""Copies of running statistics in the place of a layer's own, so that a backward reads what its forward used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.freezing.change import Change, changes_of
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.torch_private import STATISTICS, buffers_of


@contextmanager
def shadow_statistics(layers: Mapping[str, _BatchNorm]) -> Iterator[list[Change]]:
    """Inside, ``layers`` use copies of their running statistics; yields a list of what was done to the copies.

    In eval mode torch's batch_norm keeps the running statistics for its backward by reference, and a forward in train
    mode moves them without telling autograd. Where one layer is frozen for a part of a step and trained in another, the
    first part's gradients would be wrong without an error.

    The list is filled at the end. What was done to the copies has no effect on the layers' own statistics.

    Args:
        layers: By name; each with running statistics.

    Raises:
        ExchangeError: At the end, if another exchange lies on top in one of the layers.
    """
    changes: list[Change] = []
    own = {
        name: {key: buffer for key in STATISTICS if (buffer := buffers_of(layer)[key]) is not None}
        for name, layer in layers.items()
    }
    shadows = {name: {key: buffer.clone() for key, buffer in buffers.items()} for name, buffers in own.items()}
    entries = [Entries(name, layer, buffers=shadows[name]) for name, layer in layers.items()]
    with exchanged("shadow_statistics", entries):
        yield changes
        for name, layer in layers.items():
            now = {key: buffers_of(layer).get(key) for key in own[name]}
            # A forward in train mode leaves a version on the counter only.
            if any(now[key] is not shadow or shadow._version for key, shadow in shadows[name].items()):
                for key, buffer in own[name].items():
                    changes += changes_of((name, key), buffer, now[key])
