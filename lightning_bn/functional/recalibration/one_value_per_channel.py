"""How many values per channel a layer is given, and the refusal of a single one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class OneValuePerChannelError(ValueError):
    """A layer was given one value per channel, of which there is no variance.

    Attributes:
        layer: Its name.
    """

    def __init__(self, layer: str) -> None:
        super().__init__(f"BatchNorm layer {layer!r} was given one value per channel, of which there is no variance")
        self.layer = layer


@contextmanager
def single_values_refused(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Have forwards inside that give one of ``layers`` one value per channel raise :class:`OneValuePerChannelError`.

    For layers without running statistics, which normalize with the batch in every mode, so that torch would raise an
    error of its own that says nothing of the layer.
    """

    def hook(name: str, channels: int) -> Any:
        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values_per_channel(name, channels, args, kwargs)

        return before_forward

    handles = [
        layer.register_forward_pre_hook(hook(name, layer.num_features), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def values_per_channel(
    name: str, channels: int, args: tuple[Any, ...], kwargs: dict[str, Any], alone: bool = True
) -> int:
    """Return the values per channel in what a layer was called with.

    Raises:
        OneValuePerChannelError: If it is one, and the layer is alone with it.
    """
    batch: Tensor = args[0] if args else next(iter(kwargs.values()))
    count = batch.numel() // channels
    if count == 1 and alone:
        raise OneValuePerChannelError(name)
    return count
