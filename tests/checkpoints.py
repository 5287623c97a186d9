"""Checkpoints read and compared, shared by the tests of what rewrites them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bn.functional.statistics.recalibration_record import KEY
from tests.models import bits


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def without_record(content: dict[str, Any]) -> dict[str, Any]:
    """What a recalibrated file holds beside the record of that."""
    assert content[KEY]["recalibrated"]
    return {key: value for key, value in content.items() if key != KEY}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested values differ: type, order of keys, dtype or a bit."""
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} became {type(other).__name__}"]
    if isinstance(one, dict):
        attributes = differences(getattr(one, "_metadata", None), getattr(other, "_metadata", None), f"{path}/metadata")
        if list(one) != list(other):
            return [f"{path}: keys {list(one)} became {list(other)}"]
        return attributes + [place for key in one for place in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: length {len(one)} became {len(other)}"]
        return [
            p for index, pair in enumerate(zip(one, other, strict=True)) for p in differences(*pair, f"{path}/{index}")
        ]
    if isinstance(one, Tensor):
        same = (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device) and bits(one) == bits(
            other
        )
        return [] if same else [path]
    return [] if one == other or (one != one and other != other) else [path]
