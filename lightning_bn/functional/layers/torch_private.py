"""The one place that knows torch's private parts: the dictionaries in which a module keeps what it holds.

Read directly, since attribute look-up on a module is slow, and since an entry is exchanged without running anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")
TORCHS_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
"""What a layer runs that has no forward of its own."""

INTERNAL = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers, by name; a copy where they lie in TorchScript."""
    own: Any = module._buffers
    return own if isinstance(own, dict) else dict(own.items())


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The module's own parameters, by name, also tensors put in the place of one; a copy where TorchScript has them."""
    own: Any = module._parameters
    return own if isinstance(own, dict) else dict(own.items())


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Everything else that lies on the module itself."""
    return module.__dict__


def set_training(module: nn.Module, training: bool) -> None:
    """Set a module's own ``training`` flag, without its ``__setattr__``, which looks for much else first."""
    if "training" in attributes_of(module):
        attributes_of(module)["training"] = training
    else:
        module.training = training


def running_backward() -> int | None:
    """The number of the backward that runs this code, as it does with checkpointed forwards; None outside of any."""
    number = torch._C._current_graph_task_id()
    return None if number == -1 else int(number)


def in_backward() -> bool:
    """Whether this code is run by a backward."""
    return running_backward() is not None


def may_run_again() -> bool:
    """Whether a backward may repeat what runs now, as activation checkpointing does.

    Its kind with a backward of its own runs without gradients first; the other one keeps hooks for saved tensors, which
    old versions of torch do not tell: there, whatever has gradients may run again.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return not torch.is_grad_enabled() or hooks is None or hooks(True) is not None


# torch 2.6 does not tell (False); what it exports is right all the same.
_is_exporting = getattr(torch.compiler, "is_exporting", bool)


def is_transformed() -> bool:
    """Whether what runs now is traced, exported, or transformed by torch.func or forward-mode differentiation."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or _is_exporting()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The submodules, by name; a copy where they lie in TorchScript."""
    own: Any = module._modules
    return own if isinstance(own, dict) else dict(own.items())


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule of that name, None if there is none."""
    return children_of(module).get(name)


def places_of(layer: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where a BatchNorm layer keeps its values: what each is called, the dictionary, and the key in it.

    A parametrized ``weight`` is computed from parameters that are kept below it, each of which is a value then; a
    pruned one from the parameter that it was, which has another key.

    Args:
        layer: Which.
        names: Of :data:`STATISTICS` and :data:`AFFINE`.
    """
    parametrizations = child_of(layer, "parametrizations")
    for name in names:
        if name in STATISTICS:
            yield name, buffers_of(layer), name
        elif isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
            below = parameters_of(parametrizations[name])
            yield from ((f"{name}.{key}", below, key) for key in below)
        else:
            own = parameters_of(layer)
            yield name, own, f"{name}_orig" if name not in own and f"{name}_orig" in own else name
