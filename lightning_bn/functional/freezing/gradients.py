"""Affine parameters that a forward uses without contributing to their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class WithheldGradients:
    """Forwards of ``layers`` contribute zero to the gradients of ``weight`` and ``bias``, from construction to release.

    What other forwards contribute, before, after or in the same backward, is not changed. The parameters still receive
    a gradient, of zeros where nothing else contributes, since a distributed backward waits for it.

    Args:
        layers: Which; their parameters are replaced by tensors of the same values until :meth:`release`.
    """

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self._found: list[tuple[_BatchNorm, str, nn.Parameter]] = []
        with torch.enable_grad():
            for layer in layers:
                for name in ("weight", "bias"):
                    parameter = layer._parameters.get(name)
                    if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                        self._found.append((layer, name, parameter))
                        layer._parameters[name] = _zero_gradient(parameter)  # type: ignore[assignment]

    def release(self) -> None:
        """Puts the parameters back; harmless when repeated."""
        for layer, name, parameter in self._found:
            layer._parameters[name] = parameter
        self._found = []


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Takes gradients away, so that an optimizer skips them.

    With a gradient of zeros it would not: weight decay and momentum move a parameter that has one.
    """
    for parameter in parameters:
        parameter.grad = None


def drop_zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Takes gradients away that are zero throughout: nothing contributed to them."""
    having = [(parameter, gradient) for parameter in parameters if (gradient := parameter.grad) is not None]
    if having:
        # One look at the device for all of them.
        used = torch.stack([gradient.detach().count_nonzero() for _, gradient in having]).tolist()
        for (parameter, _), count in zip(having, used, strict=True):
            if not count:
                parameter.grad = None


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
    return _ZeroGradient.apply(parameter)  # type: ignore[no-untyped-call,no-any-return]
