"""Faults written into a state dict."""

from typing import Any

from torch import Tensor


def fill(state: dict[str, Tensor], name: str, mean: Any = None, var: Any = None, **others: Any) -> None:
    """Change a layer of a state dict: a number for all channels, or by channel."""
    for part, value in {"running_mean": mean, "running_var": var, **others}.items():
        channels = {None: value} if isinstance(value, float | int) else value or {}
        for channel, one in channels.items():
            state[f"{name}.{part}"][slice(None) if channel is None else channel] = one
