"""Copies of a network that are kept beside the one that trains: teachers, momentum encoders, target networks."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import nn

from lightning_bn.functional.layers.names import named_batch_norm, named_paths
from lightning_bn.functional.layers.patterns import is_below

_Form: TypeAlias = tuple[tuple[str, torch.Size], ...]
_SHARE = 1 / 3
"""Of a model's BatchNorm layers; what is less is a part of a network, of which others may have the same form."""


def layers_of_teachers(model: nn.Module) -> set[str]:
    """Return the layers in parts that require no gradient and have the form of other parts, which require some.

    Empty unless they are a third of all layers: parts of one network may have the same form, too.
    """
    modules = {name: module for name, module in named_paths(model) if name}
    frozen = {name for name, module in modules.items() if _is_frozen(module)}
    forms = {(type(module), _form(module)) for name, module in modules.items() if name not in frozen}
    # Not the parts of what is frozen: single layers often have the same form.
    whole = {name for name in frozen if not any(name != other and is_below(name, other) for other in frozen)}
    copies = [name for name in whole if (type(modules[name]), _form(modules[name])) in forms]
    layers = named_batch_norm(model)
    found = {layer for layer in layers if any(is_below(layer, name) for name in copies)}
    return found if len(found) >= _SHARE * len(layers) else set()


def _is_frozen(module: nn.Module) -> bool:
    parameters = [*module.parameters()]
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _form(module: nn.Module) -> _Form:
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())
