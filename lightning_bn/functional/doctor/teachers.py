"""Copies of a network that are kept beside the one that trains: teachers, momentum encoders, target networks."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeAlias

import torch
from torch import nn

from lightning_bn.functional.layers.names import named_batch_norm, named_paths
from lightning_bn.functional.layers.patterns import is_below

_Form: TypeAlias = tuple[tuple[str, torch.Size], ...]
_SHARE = 1 / 3
"""Of a model's BatchNorm layers; what is less is a part of a network, of which others may have the same form."""


def layers_of_teachers(model: nn.Module) -> set[str]:
    """Return the layers in parts that require no gradient and have the form of another part, which requires some."""
    layers = named_batch_norm(model)
    frozen = {name: module for name, module in named_paths(model) if name and _is_frozen(module)}
    found: set[str] = set()
    for name, module in frozen.items():
        inside = [layer for layer in layers if is_below(layer, name)]
        if len(inside) >= _SHARE * len(layers) and not found.issuperset(inside):
            form = _form(module)
            if any(_form(other) == form for other in _that_train(model, name, frozen)):
                found.update(inside)
    return found


def _that_train(model: nn.Module, name: str, frozen: Collection[str]) -> Iterator[nn.Module]:
    """Other parts of a model than one, neither in it nor around it."""
    for other, module in named_paths(model):
        if other not in frozen and not is_below(other, name) and not is_below(name, other):
            yield module


def _is_frozen(module: nn.Module) -> bool:
    parameters = [*module.parameters()]
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _form(module: nn.Module) -> _Form:
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())
