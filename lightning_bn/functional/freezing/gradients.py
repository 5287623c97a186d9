"""Gradients of affine parameters: blocked in a forward, or dropped before a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.torch_private import AFFINE, parameters_of


@contextmanager
def blocked_gradients(layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Inside, forwards of ``layers`` contribute zero to the gradients of ``weight`` and ``bias``.

    What other forwards contribute, before, after or in the same backward, is not changed. The parameters still receive
    a gradient, of zeros where nothing else contributes, since a distributed backward waits for it.

    Args:
        layers: By name; inside, tensors of the same values are in the place of their parameters.

    Raises:
        ExchangeError: At the end, if another exchange lies on top in one of the layers.
    """
    with torch.enable_grad():
        blocked = {
            name: {
                key: _zero_gradient(parameter)
                for key in AFFINE
                if isinstance(parameter := parameters_of(layer).get(key), nn.Parameter) and parameter.requires_grad
            }
            for name, layer in layers.items()
        }
    entries = [Entries(name, layers[name], parameters=tensors) for name, tensors in blocked.items() if tensors]
    with exchanged("blocked_gradients", entries):
        yield


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Drop gradients, so that an optimizer skips them.

    With a gradient of zeros it would not: weight decay and momentum move a parameter that has one.
    """
    for parameter in parameters:
        parameter.grad = None


def drop_zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Drop gradients that are zero throughout: nothing contributed to them."""
    having = [(parameter, gradient) for parameter in parameters if (gradient := parameter.grad) is not None]
    if having:
        # One look at the device for all of them.
        used = torch.stack([gradient.detach().count_nonzero() for _, gradient in having]).tolist()
        for (parameter, _), count in zip(having, used, strict=True):
            if not count:
                parameter.grad = None


_BLOCKED = "_lightning_bn_blocked"


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        # Not a view: under manual optimization the parameter is written to while this is in use.
        with torch.no_grad():
            alias = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            return alias.set_(
                parameter.untyped_storage(), parameter.storage_offset(), parameter.size(), parameter.stride()
            )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def _zero_gradient(parameter: Tensor) -> Tensor:
    blocked: Tensor = _ZeroGradient.apply(parameter)  # type: ignore[no-untyped-call]
    setattr(blocked, _BLOCKED, True)
    return blocked


def is_blocked(tensor: Tensor) -> bool:
    """Whether a tensor is in the place of a parameter whose gradients are blocked."""
    return hasattr(tensor, _BLOCKED)
