"""Contexts that leave a model and the random number generators as they were, whatever happens inside."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._bits import Flat, is_plain, same_bits
from lightning_bn.functional.layers.properties import has_running_statistics, is_lazy
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.layers.torch_private import buffers_of
from lightning_bn.functional.recalibration.one_value_per_channel import single_values_refused
from lightning_bn.functional.recalibration.weights import preserved_weights

_PLAIN_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@contextmanager
def isolated_statistics(
    model: nn.Module,
    targets: Collection[_BatchNorm],
    *,
    containers_in_eval: bool = False,
    also: Collection[dict[str, Any]] = (),
) -> Iterator[None]:
    """Run forwards that collect the statistics of ``targets``; all else is afterwards as it was, whatever happens.

    ``also`` are further dictionaries of tensors, which are put back as buffers are.
    """
    # Layers without statistics normalize with the batch in every mode.
    always = {name: layer for name, layer in batch_norm_layers(model).items() if not has_running_statistics(layer)}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        run_as_written(),
        preserved_rng(),
        preserved_modes(model),
        preserved_weights(model),
        preserved_buffers(model, also),
        single_values_refused(always),
    ):
        set_modes_for_statistics(model, targets, containers_in_eval=containers_in_eval)
        yield


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put back at the end: Python's, numpy's (where loaded) and torch's generators, CUDA's included."""
    with ExitStack() as at_the_end:
        for set_state, state in _generators():
            at_the_end.callback(set_state, state)
        yield


def generator_states() -> bytes:
    """The states of all these generators, to be compared: whoever draws a number changes them."""
    return pickle.dumps([state.numpy() if isinstance(state, Tensor) else state for _, state in _generators()])


def _generators() -> list[tuple[Callable[[Any], Any], Any]]:
    """What sets the state of each generator, and its state."""
    found: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    if (numpy := sys.modules.get("numpy")) is not None:
        found.append((numpy.random.set_state, numpy.random.get_state()))
    found.append((torch.set_rng_state, torch.get_rng_state()))
    if torch.cuda.is_initialized():
        found += [
            (partial(torch.cuda.set_rng_state, device=i), torch.cuda.get_rng_state(i))
            for i in range(torch.cuda.device_count())
        ]
    return found


@contextmanager
def preserved_buffers(model: nn.Module, also: Collection[dict[str, Any]] = ()) -> Iterator[None]:
    """Put back at the end all buffers of ``model`` and ``also``: the same objects with the same form and bits.

    Of sparse ones the objects; a buffer that was resized gets memory of its own.

    Costs a copy of them for the duration.
    """
    homes = [*map(buffers_of, model.modules()), *also]
    found = [(home, dict(home)) for home in homes]
    every = {id(buffer): buffer for home in homes for buffer in home.values() if buffer is not None}
    real = [buffer for buffer in every.values() if not is_lazy(buffer) and is_plain(buffer)]
    values, forms = Flat(real), [_form(buffer) for buffer in real]
    try:
        yield
    finally:
        with torch.no_grad():
            for now, buffers in found:
                now.clear()
                now.update(buffers)
            reformed = {id(buffer) for buffer, form in zip(real, forms, strict=True) if _form(buffer) != form}
            if reformed or not values.same_bits(real):
                for buffer, (shape, stride, dtype), kept in zip(real, forms, values.parts(), strict=True):
                    if id(buffer) in reformed:
                        buffer.data = torch.empty_strided(shape, stride, dtype=dtype, device=kept.device)
                    # Only what changed is written: a write bumps the version that others watch.
                    if not same_bits(buffer.reshape(-1), kept):
                        buffer.copy_(kept.view_as(buffer))


def _form(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Put back at the end every module's ``training`` flag, set directly and not through ``.train()``."""
    with ExitStack() as at_the_end:
        for module in model.modules():
            at_the_end.callback(setattr, module, "training", module.training)
        yield


def run_as_written() -> AbstractContextManager[None]:
    """Run compiled submodules as they are written, where hooks added after compilation fire and nothing recompiles."""
    # Whatever is compiled has loaded dynamo, and loading it for nothing costs seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def set_modes_for_statistics(
    model: nn.Module, targets: Collection[_BatchNorm], *, containers_in_eval: bool = False
) -> None:
    """Set the modes in which a forward collects the statistics of ``targets`` and moves nothing else.

    Targets go to train mode and everything that may act on its mode to eval: other BatchNorm layers, all leaf modules
    (dropout off, spectral norm and codebooks still) and torch's own composite layers (attention has its dropout
    inside). Containers keep their flag, since models branch on it: a detector returns losses only in training; with
    ``containers_in_eval`` they go to eval too.
    """
    chosen = {id(layer) for layer in targets}
    for module in model.modules():
        if id(module) in chosen:
            module.training = True
        elif (
            containers_in_eval
            or isinstance(module, _BatchNorm)
            or not [*module.children()]
            or _is_composite_layer(type(module))
        ):
            module.training = False


def _is_composite_layer(kind: type[nn.Module]) -> bool:
    bases = [base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules.")]
    return not issubclass(kind, _PLAIN_CONTAINERS) and any(base is not nn.Module for base in bases)
