"""What callbacks of this package left in a checkpoint, as far as it is about whose statistics are whose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_bn.functional.layers.names import without_wrappers


def frozen_in(content: Mapping[str, Any]) -> set[str]:
    """Return the layers whose running statistics were frozen by a BatchNormFreezer, as it records them in a file."""
    found: set[str] = set()
    for state in _states_of("BatchNormFreezer", content):
        if _dictionary(state.get("settings")).get("stats", True):
            found |= set(map(without_wrappers, _texts(_dictionary(state.get("report")).get("layers"))))
    return found


def other_tasks_in(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return tasks whose statistics a TaskBatchNorm saved in a file, but the default, whose are the model's own."""
    found: dict[str, None] = {}
    for state in _states_of("TaskBatchNorm", content):
        found |= dict.fromkeys(task for task in _texts(state.get("tasks")) if task != state.get("default"))
    return tuple(found)


def _states_of(callback: str, content: Mapping[str, Any]) -> list[Mapping[Any, Any]]:
    states = _dictionary(content.get("callbacks"))
    return [_dictionary(state) for key, state in states.items() if isinstance(key, str) and key.startswith(callback)]


def _dictionary(value: Any) -> Mapping[Any, Any]:
    """The value, if it is a dictionary: a file may have anything anywhere."""
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    """Those of the values that are texts."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list | tuple) else []
