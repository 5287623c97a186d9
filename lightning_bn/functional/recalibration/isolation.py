"""Contexts that leave a model and the random number generators as they were, whatever happens inside."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._bits import Flat, is_plain, same_bits
from lightning_bn.functional.layers.properties import has_running_statistics, is_lazy
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.torch_private import buffers_of
from lightning_bn.functional.recalibration.one_value_per_channel import single_values_refused

_PLAIN_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_COMPOSITE: dict[type, bool] = {}


@contextmanager
def isolated_statistics(model: nn.Module, targets: Collection[_BatchNorm]) -> Iterator[None]:
    """Run forwards that collect the statistics of ``targets``; all else is afterwards as it was, whatever happens."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(run_as_written())
        stack.enter_context(preserved_rng())
        stack.enter_context(preserved_modes(model))
        stack.enter_context(preserved_buffers(model))
        # Layers without statistics normalize with the batch in every mode.
        layers = batch_norm_layers(model)
        always = {name: layer for name, layer in layers.items() if not has_running_statistics(layer)}
        stack.enter_context(single_values_refused(always))
        set_modes_for_statistics(model, targets)
        yield


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put back at the end: Python's, numpy's (where loaded) and torch's generators, CUDA's included."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put back at the end all buffers of ``model``: the same objects with the same bits (sparse ones: the objects).

    Costs a copy of them for the duration.
    """
    found = [(buffers_of(module), dict(buffers_of(module))) for module in model.modules()]
    real = [buffer for _, buffers in found for buffer in _real(buffers.values())]
    values = Flat(real)
    try:
        yield
    finally:
        with torch.no_grad():
            for now, buffers in found:
                now.clear()
                now.update(buffers)
            if not values.same_bits(real):
                for buffer, kept in zip(real, values.parts(), strict=True):
                    # Only what changed is written: a write bumps the version that others watch.
                    if not same_bits(buffer.reshape(-1), kept):
                        buffer.copy_(kept.view_as(buffer))


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Put back at the end every module's ``training`` flag, set directly and not through ``.train()``."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def run_as_written() -> Iterator[None]:
    """Run compiled submodules as they are written, where hooks added after compilation fire and nothing recompiles."""
    # Whatever is compiled has loaded dynamo, and loading it for nothing costs seconds.
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def set_modes_for_statistics(model: nn.Module, targets: Collection[_BatchNorm]) -> None:
    """Set the modes in which a forward collects the statistics of ``targets`` and moves nothing else.

    Targets go to train mode and everything that may act on its mode to eval: other BatchNorm layers, all leaf modules
    (dropout off, spectral norm and codebooks still) and torch's own composite layers (attention has its dropout
    inside). Containers keep their flag, since models branch on it: a detector returns losses only in training.
    """
    chosen = {id(layer) for layer in targets}
    for module in model.modules():
        if id(module) in chosen:
            module.training = True
        elif isinstance(module, _BatchNorm) or _is_leaf(module) or _is_composite_layer(type(module)):
            module.training = False


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_composite_layer(kind: type[nn.Module]) -> bool:
    if kind not in _COMPOSITE:
        bases = [base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.")]
        _COMPOSITE[kind] = not issubclass(kind, _PLAIN_CONTAINERS) and any(base is not nn.Module for base in bases)
    return _COMPOSITE[kind]


def _real(buffers: Iterable[Tensor | None]) -> Iterator[Tensor]:
    for buffer in buffers:
        if buffer is not None and not is_lazy(buffer) and is_plain(buffer):
            yield buffer
