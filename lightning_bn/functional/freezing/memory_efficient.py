"""A forward in evaluation whose backward needs the scale alone, so that it keeps nothing of its input.

A layer whose statistics and affine parameters are constants is an affine map: the gradient of its input is that of its
output times ``weight / sqrt(running_var + eps)``. torch keeps the whole input nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_bn.functional.layers.torch_private import TORCHS_FORWARDS, buffers_of, is_transformed

Forward = Callable[..., Any]


def normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    """Return what torch's BatchNorm gives in evaluation, bit for bit, and keep nothing of the input for the backward.

    The backward gives the input's gradient, up to the rounding of one multiplication, and zeros for ``weight`` and
    ``bias`` where they require one: they are constants here, and a distributed backward waits for their gradients.

    Args:
        input: Shape ``(N, C, *)``, or ``(N, C)``.
        weight: Shape ``(C,)``; None for ones.
        bias: Shape ``(C,)``; None for zeros.
        mean: Running mean, shape ``(C,)``.
        variance: Running variance, biased or not, shape ``(C,)``.
        eps: Added to the variance.
    """
    return _Constant.apply(input, weight, bias, mean, variance, eps)  # type: ignore[no-untyped-call,no-any-return]


def memory_efficient(forward: Forward, applies: Callable[[_BatchNorm], bool]) -> FunctionType:
    """Return a forward of a class of layers that runs ``forward``, and keeps nothing of its input where that is right.

    Where it is not, or not needed, ``forward`` runs as it is: without gradients, in train mode, without running
    statistics, while it is traced, exported or scripted, and in what torch.func and forward mode transform.

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
    tensors = [one for one in (*given, layer.weight, layer.bias) if isinstance(one, Tensor)]
    if not any(one.requires_grad for one in tensors) or not any(isinstance(one, Tensor) for one in given):
        return False
    buffers = buffers_of(layer)
    return None not in (buffers.get("running_mean"), buffers.get("running_var")) and not is_transformed()


def _run_torchs(layer: _BatchNorm, forward: Forward, input: Tensor) -> Tensor:
    layer._check_input_dim(input)
    if isinstance(layer, nn.SyncBatchNorm):
        layer._check_non_zero_input_channels(input)
    mean, variance = layer.running_mean, layer.running_var
    return normalize(input, layer.weight, layer.bias, mean, variance, layer.eps)  # type: ignore[arg-type]


def _run_own(layer: _BatchNorm, forward: Forward, *args: Any, **kwargs: Any) -> Any:
    # A forward of its own, with an activation inside for instance: whichever way it comes to torch's function.
    with _Normalizing(layer.running_mean):
        return forward(layer, *args, **kwargs)


class _Normalizing(TorchFunctionMode):
    """Inside, ``F.batch_norm`` in evaluation with this running mean keeps nothing of its input."""

    def __init__(self, mean: Tensor | None) -> None:
        super().__init__()
        self._mean = mean

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
        if running_mean is None or running_var is None or running_mean is not self._mean or training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return normalize(input, weight, bias, running_mean, running_var, eps)


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        # References, as torch's own keeps them: nothing that is not there already, and none can be out of date.
        ctx.save_for_backward(weight, bias, mean, variance)
        ctx.eps = eps
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, mean, variance = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            _scaled(gradient, weight, mean, variance, ctx.eps) if needed[0] else None,
            torch.zeros_like(weight) if needed[1] else None,
            torch.zeros_like(bias) if needed[2] else None,
            *(None, None, None),
        )


def _scaled(gradient: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    weight = None if weight is None else weight.detach()
    if gradient.dtype in (torch.float32, torch.float64) and gradient.dtype == variance.dtype:
        shape = (-1, *(1,) * (gradient.dim() - 2))
        if not gradient.is_cpu:
            scale = torch.rsqrt(variance + eps)
            return gradient * (scale if weight is None else scale * weight).view(shape)
        # As torch's kernel for the CPU does it, for the same bits: rounded from double, then one after the other.
        scaled = gradient * torch.rsqrt(variance.double() + eps).to(gradient.dtype).view(shape)
        if weight is None:
            return scaled
        return scaled * weight.view(shape) if torch.is_grad_enabled() else scaled.mul_(weight.view(shape))
    # torch's own, which reads mixed and half precision without a copy in single precision. The input, which it takes
    # for the gradients of weight and bias, could be anything of that shape.
    wanted = [True, False, False]
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        gradient, gradient.detach(), weight, mean, variance, None, None, False, eps, wanted
    )
    return found[0]
