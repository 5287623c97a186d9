"""A forward in evaluation whose backward needs the scale alone, so that it keeps nothing of its input.

A layer whose statistics and affine parameters are constants is an affine map: the gradient of its input is that of its
output times ``weight / sqrt(running_var + eps)``. torch keeps the whole input nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lightning_bn.functional.freezing.gradients import is_blocked
from lightning_bn.functional.layers.torch_private import TORCHS_FORWARDS, buffers_of, is_transformed

Forward = Callable[..., Any]

LEAST, LEAST_ON_ACCELERATORS = 2**14, 2**20
"""Values that an input has at least, on a CPU and elsewhere: of fewer there is little to save, and the layer's own
forward is faster. What Python costs here, a GPU waits for where its kernels are short."""


def memory_efficient(forward: Forward, constants_of: Callable[[_BatchNorm], Constants]) -> FunctionType:
    """Return a forward of a class of layers that runs ``forward``, and keeps nothing of its input where that is right.

    Where it is not, or not needed, ``forward`` runs as it is: for small inputs, without gradients, in train mode,
    without running statistics, where ``weight`` or ``bias`` are to get gradients, while it is traced, exported or
    scripted, and in what torch.func and forward mode transform.

    Args:
        forward: The class's own.
        constants_of: Which values of a layer are constants.
    """
    # No globals in it: it has those of what it wraps.
    run, needed, none = _run_torchs if forward in TORCHS_FORWARDS else _run_own, _needed, Constants.NONE

    def wrapper(self, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        constants = constants_of(self)
        if constants is not none and needed(self, (*args, *kwargs.values())):
            return run(self, forward, constants, *args, **kwargs)
        return forward(self, *args, **kwargs)

    # torch.jit.script compiles the source of what is wrapped, and looks its names up where the function has its own.
    function = FunctionType(wrapper.__code__, forward.__globals__, "forward", None, wrapper.__closure__)
    function.__wrapped__ = forward  # type: ignore[attr-defined]
    function.__doc__, function.__module__ = forward.__doc__, forward.__module__
    return function


class Constants(Enum):
    """Which values of a layer are constants.

    Attributes:
        NONE: Not all of them.
        WITHOUT_GRADIENTS: All, as long as ``weight`` and ``bias`` require no gradient: who has them require one again
            wants them to train.
        WITH_ZEROS: All; a ``weight`` or ``bias`` that requires a gradient gets zeros, for which a distributed backward
            waits, and which are dropped before the step.
    """

    NONE = auto()
    WITHOUT_GRADIENTS = auto()
    WITH_ZEROS = auto()


def _needed(layer: _BatchNorm, given: tuple[Any, ...]) -> bool:
    if layer.training or not torch.is_grad_enabled():
        return False
    # Plain loops: this runs before every forward of every frozen layer.
    tensors = [one for one in given if isinstance(one, Tensor)]
    if not tensors or (not torch.compiler.is_compiling() and _is_small(tensors[0])):
        return False
    for one in (*tensors, getattr(layer, "weight", None), getattr(layer, "bias", None)):
        if one is not None and one.requires_grad:
            break
    else:
        return False
    buffers = buffers_of(layer)
    tracked = buffers.get("running_mean") is not None and buffers.get("running_var") is not None
    return tracked and not is_transformed()


def _is_small(input: Tensor) -> bool:
    values = input.numel()
    return values < LEAST or (values < LEAST_ON_ACCELERATORS and not input.is_cpu)


def _run_torchs(layer: _BatchNorm, forward: Forward, constants: Constants, /, *args: Any, **kwargs: Any) -> Any:
    weight, bias = layer.weight, layer.bias
    if not _are_constants(constants, weight, bias) or layer.running_mean is None or layer.running_var is None:
        return forward(layer, *args, **kwargs)
    return _normalize_with(layer, weight, bias, *args, **kwargs)


def _normalize_with(layer: _BatchNorm, weight: Tensor | None, bias: Tensor | None, /, input: Tensor) -> Tensor:
    layer._check_input_dim(input)
    if isinstance(layer, nn.SyncBatchNorm):
        layer._check_non_zero_input_channels(input)
    return _normalize(input, layer.running_mean, layer.running_var, weight, bias, layer.eps)  # type: ignore[arg-type]


def _run_own(layer: _BatchNorm, forward: Forward, constants: Constants, /, *args: Any, **kwargs: Any) -> Any:
    # A forward of its own, with an activation inside for instance: whichever way it comes to torch's function.
    with _Normalizing(layer, constants):
        return forward(layer, *args, **kwargs)


def _are_constants(constants: Constants, *affine: Tensor | None) -> bool:
    """Whether these may stand for a layer's weight and bias and get no gradient, or zeros."""
    required = [one for one in affine if one is not None and one.requires_grad]
    # Another tensor than the layer's own, as functional_call puts there, is somebody's who wants its gradient.
    own = all(isinstance(one, nn.Parameter) or is_blocked(one) for one in required)
    return not required or (own and constants is Constants.WITH_ZEROS)


class _Normalizing(TorchFunctionMode):
    """Inside, ``F.batch_norm`` in evaluation with a layer's values keeps nothing of its input."""

    def __init__(self, layer: _BatchNorm, constants: Constants) -> None:
        super().__init__()
        self._layer, self._constants = layer, constants

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
        layer = self._layer
        own = running_mean is not None and running_mean is layer.running_mean
        for one, key in ((weight, "weight"), (bias, "bias")):
            # What a layer computes of its own and of others' tensors trains those.
            own = own and (one is None or not one.requires_grad or one is getattr(layer, key, None))
        if training or not own or running_mean is None or running_var is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if not _are_constants(self._constants, weight, bias):
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _normalize(input, running_mean, running_var, weight, bias, eps)


def _normalize(
    input: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return what torch's kernel gives in evaluation, and keep nothing of the input for the backward."""
    return _Constant.apply(input, weight, bias, mean, variance, eps)  # type: ignore[no-untyped-call,no-any-return]


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> Tensor:
        # References, as torch's own keeps them: nothing that is not there already, and none can be out of date.
        ctx.save_for_backward(weight, mean, variance)
        ctx.eps, ctx.form, ctx.of_bias = eps, _format_of(input), None if bias is None else bias.dtype
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, variance = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            _scaled(gradient.contiguous(memory_format=ctx.form), weight, mean, variance, ctx.eps)
            if needed[0]
            else None,
            torch.zeros_like(weight) if needed[1] else None,
            torch.zeros_like(variance, dtype=ctx.of_bias) if needed[2] else None,
            *(None, None, None),
        )


def _format_of(input: Tensor) -> torch.memory_format:
    """The memory format of what torch's kernel gives for an input, and of the input's gradient."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if last is None or input.is_contiguous() or not input.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _scaled(gradient: Tensor, weight: Tensor | None, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    weight = None if weight is None else weight.detach()
    single = gradient.dtype in (torch.float32, torch.float64) and gradient.dtype == variance.dtype
    if gradient.device.type == "cpu" and single:  # is_cpu: not read by the compiler of torch 2.6
        # As torch's kernel for the CPU does it, for the same bits, without reading an input: the scale is rounded from
        # double, and the weight comes after it.
        shape = (-1, *(1,) * (gradient.dim() - 2))
        scaled = gradient * torch.rsqrt(variance.double() + eps).to(gradient.dtype).view(shape)
        return scaled if weight is None else scaled.mul_(weight.view(shape))
    if not gradient.numel():
        return gradient.clone()  # what follows divides by it
    # torch's own, which is one kernel on a GPU and reads half precision without a copy in single precision. The input,
    # which it takes for the gradients of weight and bias, could be anything of that shape.
    anything = gradient.detach() if torch.is_grad_enabled() else gradient
    wanted = [True, False, False]
    # For statistics of the batch; the kernel for CUDA asserts that they are there, and reads none that are empty.
    unused = variance.new_empty(0)
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        gradient, anything, weight, mean, variance, unused, unused, False, eps, wanted
    )
    return found[0]
