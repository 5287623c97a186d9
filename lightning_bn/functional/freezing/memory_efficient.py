"""A forward in evaluation whose backward needs the scale alone, so that it keeps nothing of its input.

A layer whose statistics and affine parameters are constants is an affine map: the gradient of its input is that of its
output times ``weight / sqrt(running_var + eps)``. torch keeps the whole input nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_bn.functional.layers.torch_private import TORCHS_FORWARDS, buffers_of, is_transformed

Forward = Callable[..., Any]

RENEW_EVERY = 50
"""Forwards after which a scale is computed again: ``running_var.data.copy_(...)``, say, leaves no version behind."""


def memory_efficient(forward: Forward, applies: Callable[[_BatchNorm], bool]) -> FunctionType:
    """Return a forward of a class of layers that runs ``forward``, and keeps nothing of its input where that is right.

    Where it is not, or not needed, ``forward`` runs as it is: without gradients, in train mode, without running
    statistics, while it is traced or scripted, and in what torch.func and forward mode transform.

    Args:
        forward: The class's own.
        applies: Whether a layer's values are constants.
    """
    run, needed = _run_torchs if forward in TORCHS_FORWARDS else _run_own, _needed

    def wrapper(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if applies(self) and needed(self, (*args, *kwargs.values())):
            return run(self, forward, *args, **kwargs)
        return forward(self, *args, **kwargs)

    # torch.jit.script compiles the source of what is wrapped, and looks its names up where the function has its own.
    function = FunctionType(wrapper.__code__, forward.__globals__, "forward", None, wrapper.__closure__)
    function.__wrapped__ = forward  # type: ignore[attr-defined]
    function.__doc__, function.__module__ = forward.__doc__, forward.__module__
    return function


def _needed(layer: _BatchNorm, given: tuple[Any, ...]) -> bool:
    if layer.training or not torch.is_grad_enabled():
        return False
    # Plain loops: this runs before every forward of every frozen layer.
    tensors = [one for one in given if isinstance(one, Tensor)]
    if not tensors:
        return False
    affine: tuple[Tensor | None, ...] = (layer.weight, layer.bias)
    for one in (*tensors, *affine):
        if one is not None and one.requires_grad:
            break
    else:
        return False
    buffers = buffers_of(layer)
    tracked = buffers.get("running_mean") is not None and buffers.get("running_var") is not None
    return tracked and not is_transformed()


def _run_torchs(layer: _BatchNorm, forward: Forward, input: Tensor) -> Tensor:
    layer._check_input_dim(input)
    if isinstance(layer, nn.SyncBatchNorm):
        layer._check_non_zero_input_channels(input)
    return _normalize(layer, input, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps)


def _run_own(layer: _BatchNorm, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    # A forward of its own, with an activation inside for instance: whichever way it comes to torch's function.
    with _Normalizing(layer):
        return forward(layer, *args, **kwargs)


class _Normalizing(TorchFunctionMode):
    """Inside, ``F.batch_norm`` in evaluation with a layer's running mean keeps nothing of its input."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self._layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._batch_norm(*args, **kwargs) if func is F.batch_norm else func(*args, **kwargs)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        own = running_mean is not None and running_mean is self._layer.running_mean
        if training or not own or running_var is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _normalize(self._layer, input, running_mean, running_var, weight, bias, eps)


def _normalize(
    layer: _BatchNorm,
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Return what torch's kernel gives in evaluation, and keep nothing of the input for the backward.

    The backward gives the input's gradient, and zeros for ``weight`` and ``bias`` where they require one: they are
    constants here, and a distributed backward waits for their gradients.
    """
    scale = None
    if variance is not None and input.dtype is variance.dtype and input.dtype in (torch.float32, torch.float64):
        scale = _scale_of(layer, variance, weight, eps)
    return _Constant.apply(input, weight, bias, mean, variance, eps, scale)  # type: ignore[no-untyped-call,no-any-return]


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        scale: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, bias, *((mean, variance) if scale is None else (scale,)))
        ctx.eps = eps
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            _scaled(gradient, weight, ctx.eps, *kept) if needed[0] else None,
            torch.zeros_like(weight) if needed[1] else None,
            torch.zeros_like(bias) if needed[2] else None,
            *(None, None, None, None),
        )


def _scaled(gradient: Tensor, weight: Tensor | None, eps: float, *kept: Tensor) -> Tensor:
    weight = None if weight is None else weight.detach()
    if len(kept) == 1:
        shape = (-1, *(1,) * (gradient.dim() - 2))
        scaled = gradient * kept[0].view(shape)
        if weight is None or not gradient.is_cpu:
            return scaled
        # One after the other, as torch's kernel for the CPU does it, for the same bits.
        return scaled.mul_(weight.view(shape))
    # torch's own, which reads mixed and half precision without a copy in single precision. The input, which it takes
    # for the gradients of weight and bias, could be anything of that shape.
    wanted = [True, False, False]
    mean, variance = kept
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        gradient, gradient.detach(), weight, mean, variance, None, None, False, eps, wanted
    )
    return found[0]


@dataclass(slots=True)
class _Scale:
    """What a layer's gradient is multiplied by, what it was computed from, and how often it may still be used."""

    value: Tensor
    variance: Tensor
    weight: Tensor | None
    state: tuple[Any, ...]
    left: int = RENEW_EVERY


_scales: WeakKeyDictionary[_BatchNorm, _Scale] = WeakKeyDictionary()


def _scale_of(layer: _BatchNorm, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return the scale, computed again only if one of the values was written to or replaced, or after a while."""
    if variance.is_cpu:
        weight = None  # multiplied by in the backward
    capturing = variance.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing:
        # A graph replays what computes it, and must not read what is replaced meanwhile.
        return _compute_scale(variance, weight, eps)
    state: tuple[Any, ...] = (eps, variance._version, variance.data_ptr())
    if weight is not None:
        state += (weight._version, weight.data_ptr())
    found = _scales.get(layer)
    same = found is not None and found.variance is variance and found.weight is weight and found.state == state
    if found is None or not same or not found.left:
        _scales[layer] = found = _Scale(_compute_scale(variance, weight, eps), variance, weight, state)
    found.left -= 1
    return found.value


def _compute_scale(variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    with torch.no_grad():
        if variance.is_cpu:
            # torch's kernel for the CPU rounds it from double.
            return torch.rsqrt(variance.double() + eps).to(variance.dtype)
        scale = torch.rsqrt(variance + eps)
        return scale if weight is None else scale * weight
