"""Forwards that normalize with the batch as in training and leave the running statistics as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.selection import LayerSelection


@contextmanager
def without_updates(
    model: nn.Module, modules: Patterns = None, *, exclude: Patterns = None, root: str = ""
) -> Iterator[tuple[str, ...]]:
    """A context in which the selected layers normalize with the batch, but do not update; yields their names.

    For the second forward of a step on the same batch or on a made one: sharpness-aware minimization, virtual
    adversarial training, MixMatch. Outputs and gradients are those of an ordinary forward in train mode;
    ``running_mean``, ``running_var`` and ``num_batches_tracked`` stay. Layers in eval mode are not affected. With
    activation checkpointing, put the backward into the context too.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.

    Raises:
        SelectionError: As for ``batch_norm_layers``.
        ExchangeError: At the end, if something else that was put into a layer inside was not taken out.

    Source: Foret et al. (2021), arXiv 2010.01412; Miyato et al. (2018), arXiv 1704.03976.

    Example:
        >>> import torch
        >>> layer = nn.BatchNorm1d(2)
        >>> with without_updates(layer):
        ...     _ = layer(torch.randn(8, 2))
        >>> layer.num_batches_tracked
        tensor(0)
    """
    layers = LayerSelection(modules, exclude, root).layers(model)
    # As a layer that was built without tracking decides in train mode.
    entries = [Entries(name, layer, attributes={"track_running_stats": False}) for name, layer in layers.items()]
    with exchanged("without_updates", entries):
        yield tuple(layers)
