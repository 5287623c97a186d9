"""Tensors from a file that may lie: how many values they claim, and which of them can be read at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MOST = 64 << 20
"""Bytes of one set of layers that are read: three million channels."""


def distinct(layers: Mapping[str, Mapping[str, Tensor]], size: int) -> dict[str, str]:
    """Return for each layer the first name of its tensors; raise if there are more of them than a file can hold.

    Args:
        layers: Tensors by the name of a layer and of the tensor.
        size: Of the file that they are from, in bytes.

    Raises:
        ValueError: If they claim more than that, or more than any network has.
    """
    places: dict[tuple[tuple[int, ...], ...], str] = {}
    same = {name: places.setdefault(_memory(parts), name) for name, parts in layers.items()}
    unique = (parts for name, parts in layers.items() if same[name] == name)
    claimed = sum(one.numel() * one.element_size() for parts in unique for one in parts.values())
    check_claim(claimed, size)
    return same


def check_claim(claimed: int, size: int) -> None:
    """Raise if there is more of BatchNorm than a file can hold, or than any network has.

    Args:
        claimed: Bytes of it.
        size: Of the file.

    Raises:
        ValueError: With both.
    """
    if claimed > min(size, MOST):
        raise ValueError(
            f"the file has {size:,} bytes, but says that it holds {claimed:,} bytes of BatchNorm. At most {MOST:,} "
            "are read, more than any network has."
        )


def unreadable(tensor: Tensor) -> str | None:
    """Return why a tensor is none that a BatchNorm layer has, in words that follow its name; None if it may be one."""
    if tensor.device.type == "meta":
        return "has no values: it was saved on the meta device"
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_complex():
        kind = "quantized" if tensor.is_quantized else "complex" if tensor.is_complex() else "sparse"
        return f"is a {kind} tensor, which no BatchNorm layer has"
    return None


def unlike(tensor: Tensor, own: Tensor) -> str | None:
    """Return why a tensor cannot be loaded in the place of a model's own, in words after its name; None if it can.

    Whole numbers in the place of fractions, and fractions of 8 bits, are values of a quantized model, whose scales lie
    elsewhere: read as they are, they are other weights.
    """
    why = unreadable(tensor)
    if why is not None and tensor.is_complex():
        return None if own.dtype.is_complex else "holds complex numbers, and the model has real ones"
    if why is not None:
        return why.partition(",")[0]
    if own.dtype.is_floating_point and not tensor.is_floating_point():
        return f"holds whole numbers ({tensor.dtype}), and the model has {own.dtype}: it is quantized, or no such value"
    if tensor.is_floating_point() and tensor.element_size() == 1 and tensor.dtype != own.dtype:
        return f"holds fractions of 8 bits ({tensor.dtype}), and the model has {own.dtype}: it is quantized"
    return None


def _memory(parts: Mapping[str, Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple((one.data_ptr(), one.numel(), *one.stride()) for one in parts.values())
