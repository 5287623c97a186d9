"""Contexts that leave a model and the random number generators as they were, whatever happens inside."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._random import preserved_rng
from lightning_bn.functional.layers.properties import has_running_statistics
from lightning_bn.functional.layers.torch_private import children_of, set_training
from lightning_bn.functional.recalibration.one_value_per_channel import single_values_refused
from lightning_bn.functional.recalibration.preserved_tensors import preserved_tensors

_PLAIN_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@contextmanager
def isolated_statistics(
    modules: Mapping[nn.Module, str],
    targets: Collection[_BatchNorm],
    *,
    containers_in_eval: bool = False,
    also: Collection[dict[str, Any]] = (),
) -> Iterator[None]:
    """Run forwards that collect the statistics of ``targets``; all else is afterwards as it was, whatever happens.

    Args:
        modules: All of the model, with their names.
        targets: Layers among them.
        containers_in_eval: As for :func:`set_modes_for_statistics`.
        also: Further dictionaries of tensors, which are put back as buffers are.
    """
    # Layers without statistics normalize with the batch in every mode.
    layers = {name: module for module, name in modules.items() if isinstance(module, _BatchNorm)}
    always = {name: layer for name, layer in layers.items() if not has_running_statistics(layer)}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        run_as_written(),
        preserved_rng(),
        preserved_modes(modules),
        preserved_tensors(modules, also),
        single_values_refused(always),
    ):
        set_modes_for_statistics(modules, targets, containers_in_eval=containers_in_eval)
        yield


@contextmanager
def preserved_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back at the end every module's ``training`` flag, set directly and not through ``.train()``."""
    found = [*modules]
    modes = [module.training for module in found]
    try:
        yield
    finally:
        for module, training in zip(found, modes, strict=True):
            if module.training is not training:
                set_training(module, training)


def run_as_written() -> AbstractContextManager[None]:
    """Run compiled submodules as they are written, where hooks added after compilation fire and nothing recompiles."""
    # Whatever is compiled has loaded dynamo, and loading it for nothing costs seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def set_modes_for_statistics(
    modules: Collection[nn.Module], targets: Collection[_BatchNorm], *, containers_in_eval: bool = False
) -> None:
    """Set the modes in which a forward collects the statistics of ``targets`` and moves nothing else.

    Targets go to train mode and everything that may act on its mode to eval: other BatchNorm layers, all leaf modules
    (dropout off, spectral norm and codebooks still) and torch's own composite layers (attention has its dropout
    inside). Containers keep their flag, since models branch on it: a detector returns losses only in training; with
    ``containers_in_eval`` they go to eval too.
    """
    chosen = {id(layer) for layer in targets}
    composite = {kind for kind in {type(module) for module in modules} if _is_composite_layer(kind)}
    for module in modules:
        target = id(module) in chosen
        if module.training is not target and (
            target
            or containers_in_eval
            or isinstance(module, _BatchNorm)
            or type(module) in composite
            or not any(child is not None for child in children_of(module).values())
        ):
            set_training(module, target)


def _is_composite_layer(kind: type[nn.Module]) -> bool:
    bases = [base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.")]
    return not issubclass(kind, _PLAIN_CONTAINERS) and any(base is not nn.Module for base in bases)
