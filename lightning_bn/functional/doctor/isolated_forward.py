"""Forwards on copies of all that a model holds in tensors, after which it is bit for bit what it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.functional._random import preserved_rng
from lightning_bn.functional.layers.exchange import Entries, exchanged
from lightning_bn.functional.layers.names import named_paths
from lightning_bn.functional.layers.properties import is_lazy
from lightning_bn.functional.layers.torch_private import buffers_of, parameters_of


@contextmanager
def isolated_forward(model: nn.Module, training: Collection[nn.Module]) -> Iterator[None]:
    """Inside, modules hold copies of their weights and buffers, and only ``training`` are in train mode.

    Costs a copy of both. Also put back: the random number generators. Nothing is kept for a backward.

    Args:
        model: Any module; what lies in TorchScript in it keeps what it holds.
        training: Modules of it.

    Raises:
        ValueError: If a module is lazy and has seen no batch yet.
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
        if any(is_lazy(tensor) for tensor in (*parameters.values(), *buffers.values()) if tensor is not None):
            raise ValueError(
                f"module {name!r} is lazy and has not seen a batch yet: run one forward pass of the model first."
            )
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
        stack.enter_context(exchanged("diagnose", entries))
        yield


def _copy(tensor: Any, copies: dict[int, Tensor]) -> Any:
    """A copy of a tensor, the same one for each of its places."""
    if id(tensor) not in copies:
        copies[id(tensor)] = _copied(tensor)
    return copies[id(tensor)]


def _copied(tensor: Any) -> Any:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
    return tensor.detach().clone() if isinstance(tensor, Tensor) else copy.deepcopy(tensor)
