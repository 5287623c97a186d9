"""A batch whose rows belong to several tasks: each task's rows as a batch of their own, or each row as channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.tasks.task_sets import Buffers


def take(batch: Tensor, indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the rows of each index, in the batch's memory format."""
    parts: tuple[Tensor, ...] = _Take.apply(batch, *indices)  # type: ignore[no-untyped-call]
    return parts


def put_together(parts: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Return the batch whose rows :func:`take` gave."""
    whole: Tensor = _PutTogether.apply(*parts, *indices)  # type: ignore[no-untyped-call]
    return whole


def evaluated_by_row(layer: _BatchNorm, sets: Sequence[Buffers], which: Tensor, batch: Tensor) -> Tensor:
    """Return what torch's BatchNorm gives for each row with a set of its own, in one call.

    Each row's channels are taken as channels of a single row: one gather of values per row and channel, and torch's own
    multiply-add, so that results have the same bits and dtypes.

    Args:
        layer: In eval mode.
        sets: Running statistics of each task.
        which: Of each row, the index of its task, ``(N,)``.
        batch: ``(N, C, ...)``, contiguous.
    """
    layer._check_input_dim(batch)
    rows, *shape = batch.shape
    mean, var = (torch.stack([one[key] for one in sets])[which].flatten() for key in ("running_mean", "running_var"))
    affine: tuple[Tensor | None, ...] = (layer.weight, layer.bias)
    weight, bias = (None if one is None else one.repeat(rows) for one in affine)
    flat = batch.reshape(1, rows * shape[0], *shape[1:])
    return F.batch_norm(flat, mean, var, weight, bias, False, 0.0, layer.eps).reshape(batch.shape)


class _Take(torch.autograd.Function):
    """The indices together name each row once, so that the gradients of the parts are put together, not added."""

    generate_vmap_rule = True

    @staticmethod
    def forward(batch: Tensor, *indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(batch[index] for index in indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (put_together(gradients, ctx.saved_tensors), *[None] * len(gradients))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, ...]:
        return take(tangent, ctx.saved_tensors)


class _PutTogether(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> Tensor:
        parts, indices = _halves(inputs)
        size = (sum(map(len, parts)), *parts[0].shape[1:])
        whole = torch.empty(size, dtype=parts[0].dtype, device=parts[0].device, memory_format=_format_of(parts[0]))
        for part, index in zip(parts, indices, strict=True):
            whole.index_copy_(0, index, part)
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        indices = _halves(inputs)[1]
        ctx.save_for_backward(*indices)
        ctx.save_for_forward(*indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = take(gradient, ctx.saved_tensors)
        return (*parts, *[None] * len(parts))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return put_together(_halves(tangents)[0], ctx.saved_tensors)


def _halves(both: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    middle = len(both) // 2
    return both[:middle], both[middle:]


def _format_of(part: Tensor) -> torch.memory_format:
    """As torch's BatchNorm chooses that of its output."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(part.dim())
    if last is not None and not part.is_contiguous() and part.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format
