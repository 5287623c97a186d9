"""Forwards on copies of all that a model holds, after which it is bit for bit what it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.functional._random import preserved_rng
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.names import named_paths
from lightning_bn.functional.layers.object_state import attributes_on_copies
from lightning_bn.functional.layers.torch_private import INTERNAL, attributes_of, buffers_of, parameters_of


@contextmanager
def isolated_forward(model: nn.Module, training: Collection[nn.Module]) -> Iterator[None]:
    """Inside, modules hold copies of all that they hold, and only ``training`` are in train mode.

    Costs a copy of weights and buffers. Also put back: what is registered on modules, and the random number generators.
    Nothing is kept for a backward.

    Args:
        model: Any module; what lies in TorchScript in it keeps what it holds.
        training: Modules of it.
    """
    trains = {id(module) for module in training}
    copies: dict[int, Tensor] = {}
    entries = []
    seen: set[int] = set()
    for name, module in named_paths(model):
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            continue
        seen.add(id(module))
        parameters, buffers = parameters_of(module), buffers_of(module)
        entries.append(
            Entries(
                name,
                module,
                {key: _copy(value, copies) for key, value in buffers.items() if value is not None},
                {key: _copy(value, copies) for key, value in parameters.items() if value is not None},
                {"training": id(module) in trains},
            )
        )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        # Hooks that are added after compilation fire only where it runs as written.
        forced = "torch._dynamo" in sys.modules
        stack.enter_context(torch.compiler.set_stance("force_eager") if forced else nullcontext())
        stack.enter_context(preserved_rng())
        stack.enter_context(_registered_as_before([one.module for one in entries]))
        stack.enter_context(exchanged("diagnose", entries))
        # What views a weight or a buffer views that of the model itself, so that it is copied too.
        stack.enter_context(attributes_on_copies(model))
        yield


@contextmanager
def _registered_as_before(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put back at the end: which buffers, parameters, submodules and hooks there are, and torch's own flags."""
    own = [{key: value for key, value in attributes_of(one).items() if key in INTERNAL} for one in modules]
    held = [{key: copy.copy(value) for key, value in one.items() if isinstance(value, dict | set)} for one in own]
    try:
        yield
    finally:
        for module, was, inside in zip(modules, own, held, strict=True):
            attributes_of(module).update(was)
            for key, value in inside.items():
                if was[key] != value if isinstance(value, set) else not _same_items(was[key], value):
                    was[key].clear()
                    was[key].update(value)


def _same_items(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return [*map(id, one.values())] == [*map(id, other.values())] and [*one] == [*other]


def _copy(tensor: Any, copies: dict[int, Tensor]) -> Any:
    """A copy of a tensor, the same one for each of its places."""
    if id(tensor) not in copies:
        copies[id(tensor)] = _copied(tensor)
    return copies[id(tensor)]


def _copied(tensor: Any) -> Any:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    return tensor.detach().clone() if isinstance(tensor, Tensor) else copy.deepcopy(tensor)
