"""How many values per channel a layer is given, and the refusal of a single one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import named


class OneValuePerChannelError(ValueError):
    """A layer was given one value per channel, of which there is no variance.

    Attributes:
        layer: Its name.
    """

    def __init__(self, layer: str) -> None:
        super().__init__(f"BatchNorm layer {named(layer)} got one value per channel, which has no variance")
        self.layer = layer


@contextmanager
def single_values_refused(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Have forwards inside that give one of ``layers`` one value per channel raise :class:`OneValuePerChannelError`.

    For layers without running statistics, which normalize with the batch in every mode, so that torch would raise an
    error of its own that says nothing of the layer.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(_refuse, name), with_kwargs=True))
        yield


def _refuse(name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    values_per_channel(name, layer, batch_in(args, kwargs))


def batch_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The batch in what a layer was called with, its only argument."""
    batch: Tensor = args[0] if args else next(iter(kwargs.values()))
    return batch


def values_per_channel(name: str, layer: _BatchNorm, batch: Tensor, alone: bool = True) -> int:
    """Return the values per channel in a batch that a layer is given.

    Raises:
        OneValuePerChannelError: If it is one, and the layer is alone with it.
    """
    count = batch.numel() // layer.num_features
    if count == 1 and alone:
        raise OneValuePerChannelError(name)
    return count
