"""Running statistics and affine parameters of BatchNorm layers frozen in place, and unfrozen again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.freezing.eval_mode import FUNCTION, PIN, let_affine_train, pin_in_eval, release
from lightning_bn.functional.freezing.proof import FreezeProof
from lightning_bn.functional.freezing.what_can_be_frozen import (
    are_constants,
    select_to_freeze,
    warn_of_initial_statistics,
)
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.properties import affine_parameters
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.layers.status import layer_status, update_status
from lightning_bn.functional.layers.torch_private import attributes_of

_REQUIRED_GRAD = "_lightning_bn_required_grad"
_ATTRIBUTES = ("training", _REQUIRED_GRAD, PIN)


def freeze_batch_norm(
    model: nn.Module,
    modules: Patterns = None,
    *,
    exclude: Patterns = None,
    root: str = "",
    stats: bool = True,
    affine: bool = True,
    memory_efficient: bool | None = None,
) -> tuple[str, ...]:
    """Freeze the selected BatchNorm layers in place until :func:`unfreeze_batch_norm`; return their names.

    With ``stats`` a layer normalizes with its running statistics in training and in evaluation, and they do not move:
    it stays in eval mode through ``.train()`` on itself or on any parent, through deepcopy, pickling and
    ``load_state_dict`` (which may set the values, since it was asked to). The layer object, its tensors and its state
    dict keys stay what they were; its class becomes a subclass of the one it had. With ``affine`` its ``weight`` and
    ``bias`` no longer require a gradient, and one that is there is dropped, so that no optimizer moves them. Freezing
    twice is freezing once.

    Layers that share a parameter are to be frozen, and unfrozen, together. Not survived: conversion to SyncBatchNorm,
    which builds new layers (freeze afterwards), and a later ``model.requires_grad_(True)``, which asks for affine
    training again.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.
        stats: Whether to freeze the running statistics.
        affine: Whether to freeze ``weight`` and ``bias``.
        memory_efficient: Whether the layers keep nothing of their inputs for the backward, which takes both to be
            frozen, by one call; None for wherever they are. What they give is the same, bit for bit.

    Raises:
        SelectionError: As for ``batch_norm_layers``; under ``stats`` also if a selected layer has no running
            statistics.
        ValueError: If neither ``stats`` nor ``affine`` is asked for, or ``memory_efficient`` without both.

    Warns:
        UserWarning: If statistics are frozen that are still those of construction.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> _ = net(torch.randn(8, 1, 5, 5))
        >>> freeze_batch_norm(net)
        ('1',)
        >>> net.train()[1].training
        False
    """
    constant = are_constants(stats=stats, affine=affine, memory_efficient=memory_efficient)
    layers = select_to_freeze(model, LayerSelection(modules, exclude, root), stats=stats, affine=affine)
    if stats:
        warn_of_initial_statistics(layers)
    restore = _as_found(layers)
    try:
        freeze_layers(layers, stats=stats, affine=affine, constant=constant if affine else None)
    except BaseException:
        restore()
        raise
    return tuple(layers)


def unfreeze_batch_norm(
    model: nn.Module,
    modules: Patterns = None,
    *,
    exclude: Patterns = None,
    root: str = "",
    stats: bool = True,
    affine: bool = True,
) -> tuple[str, ...]:
    """Unfreeze what :func:`freeze_batch_norm` froze among the selected layers; return the names of those it changed.

    A layer goes back to the mode it would be in had it not been frozen (that of the last ``.train()`` or ``.eval()``
    it was given, else the one it had), its parameters to the ``requires_grad`` they had. Layers that were not frozen
    are left alone.

    Args:
        model: Any module.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.
        stats: Whether to unfreeze the running statistics.
        affine: Whether to unfreeze ``weight`` and ``bias``.

    Raises:
        SelectionError: As for ``batch_norm_layers``.
    """
    layers = LayerSelection(modules, exclude, root).layers(model)
    return unfreeze_layers(layers, stats=stats, affine=affine, parent_trains=model.training)


@contextmanager
def frozen_batch_norm(
    model: nn.Module,
    modules: Patterns = None,
    *,
    exclude: Patterns = None,
    root: str = "",
    stats: bool = True,
    affine: bool = True,
    memory_efficient: bool | None = None,
) -> Iterator[FreezeProof]:
    """A context in which the selected layers are frozen; yields their names, and whether they stayed what they were.

    At its end, also after an exception, each layer is exactly as it was found: class, mode, ``requires_grad``, and
    frozen or not. Where activation checkpointing runs forwards again in the backward, put the backward into the
    context: after it the layers train. ``with frozen_batch_norm(model) as proof`` tells, also after the backward:
    ``proof.identical``, ``print(proof)``.

    Args:
        model: Any module.
        modules: As for :func:`freeze_batch_norm`.
        exclude: As for ``freeze_batch_norm``.
        root: As for ``freeze_batch_norm``.
        stats: As for ``freeze_batch_norm``.
        affine: As for ``freeze_batch_norm``.
        memory_efficient: As for ``freeze_batch_norm``.

    Raises:
        SelectionError: As for ``freeze_batch_norm``.
        ValueError: As for ``freeze_batch_norm``.
    """
    constant = are_constants(stats=stats, affine=affine, memory_efficient=memory_efficient)
    layers = select_to_freeze(model, LayerSelection(modules, exclude, root), stats=stats, affine=affine)
    if stats:
        warn_of_initial_statistics(layers, stacklevel=4)  # past contextlib's frame
    restore = _as_found(layers)
    try:
        freeze_layers(layers, stats=stats, affine=affine, constant=constant if affine else None)
        yield FreezeProof.of(layers, stats=stats, affine=affine)
    finally:
        restore()


def freeze_layers(
    layers: Mapping[str, _BatchNorm], *, stats: bool, affine: bool, owner: str = FUNCTION, constant: bool | None = None
) -> None:
    """Freeze layers that are already resolved; ``owner`` is who asks, and who has to unfreeze them."""
    if affine:
        # All of them before any changes: layers may share a parameter.
        for layer in layers.values():
            required = tuple(parameter.requires_grad for parameter in affine_parameters(layer))
            attributes_of(layer).setdefault(_REQUIRED_GRAD, required)
    declare(layers, stats=stats, affine=affine, owner=owner, frozen=True)
    for layer in layers.values():
        if stats:
            pin_in_eval(layer, owner, constant=constant)
        if affine:
            for parameter in affine_parameters(layer):
                parameter.requires_grad_(False)
                # An optimizer moves by a gradient that is still there, and skips a parameter that has none.
                parameter.grad = None


def unfreeze_layers(
    layers: Mapping[str, _BatchNorm], *, stats: bool, affine: bool, owner: str = FUNCTION, parent_trains: bool = False
) -> tuple[str, ...]:
    """Unfreeze layers that ``owner`` froze, as far as nobody else did; return the names of those changed."""
    requires_grad: dict[nn.Parameter, bool] = {}
    changed = declare(layers, stats=stats, affine=affine, owner=owner, frozen=False)
    for name in changed:
        layer = layers[name]
        if stats:
            release(layer, owner, parent_trains=parent_trains)
        if affine:
            let_affine_train(layer, owner)
        if affine and not layer_status(layer).affine_frozen_by:
            required = attributes_of(layer).pop(_REQUIRED_GRAD, ())
            for parameter, before in zip(affine_parameters(layer), required, strict=False):
                # Of layers that share a parameter, those frozen later found it frozen already.
                requires_grad[parameter] = before or requires_grad.get(parameter, False)
    for parameter, before in requires_grad.items():
        parameter.requires_grad_(before)
    return changed


def declare(
    layers: Mapping[str, _BatchNorm], *, stats: bool, affine: bool, owner: str, frozen: bool
) -> tuple[str, ...]:
    """Record whether ``owner`` keeps these layers frozen, without doing anything else; return the names of changes."""
    changed = []
    for name, layer in layers.items():
        before = layer_status(layer)
        for key, asked in (("stats_frozen_by", stats), ("affine_frozen_by", affine)):
            if asked:
                others = tuple(one for one in getattr(before, key) if one != owner)
                update_status(layer, **{key: (*others, owner) if frozen else others})
        if layer_status(layer) != before:
            changed.append(name)
    return tuple(changed)


def _as_found(layers: Mapping[str, _BatchNorm]) -> Callable[[], None]:
    """Return a function that takes back all that freezing changes of these layers, to how they are now."""
    kept = [
        (
            layer,
            type(layer),
            {key: attributes_of(layer)[key] for key in _ATTRIBUTES if key in attributes_of(layer)},
            layer_status(layer),
            [(parameter, parameter.requires_grad, parameter.grad) for parameter in affine_parameters(layer)],
        )
        for layer in layers.values()
    ]

    def restore() -> None:
        for layer, kind, attributes, status, parameters in kept:
            layer.__class__ = kind
            for key in _ATTRIBUTES:
                attributes_of(layer).pop(key, None)
            attributes_of(layer).update(attributes)
            update_status(layer, **vars(status))
            for parameter, requires_grad, gradient in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient

    return restore
