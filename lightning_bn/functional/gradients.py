"""Affine parameters that a forward uses without contributing to their gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.layers import affine_parameters


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


def drop_gradients(layers: Iterable[_BatchNorm]) -> None:
    """Takes the gradients of ``weight`` and ``bias`` away, so that an optimizer skips them.

    With a gradient of zeros it would not: weight decay and momentum move a parameter that has one.
    """
    for layer in layers:
        for parameter in affine_parameters(layer):
            parameter.grad = None


def drop_zero_gradients(layers: Iterable[_BatchNorm]) -> None:
    """Takes away the gradients of ``weight`` and ``bias`` that are zero throughout: nothing contributed to them."""
    parameters = [p for layer in layers for p in affine_parameters(layer) if p.grad is not None]
    if parameters:
        # One look at the device for all of them.
        used = torch.stack([_gradient(p).detach().count_nonzero() for p in parameters]).tolist()
        for parameter, count in zip(parameters, used, strict=True):
            if not count:
                parameter.grad = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def _zero_gradient(parameter: Tensor) -> Tensor:
    return _ZeroGradient.apply(parameter)  # type: ignore[no-untyped-call,no-any-return]
