"""Statistics per task as they are saved: tensors and plain values, without the default's, which are the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_bn.functional._text import counted, named, quoted
from lightning_bn.functional.tasks.task_sets import Buffers

FORMAT = 1


def state_of(sets: Mapping[str, Mapping[str, Buffers]], default: str, **settings: Any) -> dict[str, Any]:
    """Return the state of sets by task and layer; ``settings`` are kept with them."""
    flat = {
        task: {f"{name}.{key}": buffer for name, one in layers.items() for key, buffer in one.items()}
        for task, layers in sets.items()
        if task != default
    }
    return {
        "format": FORMAT,
        "layers": list(sets[default]),
        "tasks": list(sets),
        "default": default,
        **settings,
        "sets": flat,
    }


def sets_in(
    state: Mapping[str, Any], own: Mapping[str, Buffers], tasks: Sequence[str], given_up: Sequence[str]
) -> dict[str, dict[str, Buffers]]:
    """Return the saved sets by task and layer, without those of tasks that are given up.

    Raises:
        ValueError: If there are other layers or channels than in ``own``, or a task that is neither one of ``tasks``
            nor given up.
    """
    lost = [task for task in state["tasks"] if task not in tasks and task not in given_up]
    if lost:
        raise ValueError(
            f"the saved statistics have task {quoted(lost)}, but tasks has only {', '.join(tasks)}: name it in tasks, "
            "or in given_up if it is no longer needed."
        )
    saved, here = list(state["layers"]), list(own)
    if saved != here:
        gone, new = ([name for name in one if name not in other] for one, other in ((saved, here), (here, saved)))
        what = "; ".join(
            f"{'only' if names else 'none only'} {where}: {quoted(names) or '-'}"
            for names, where in ((gone, "in the file"), (new, "in the model"))
        )
        raise ValueError(f"the saved statistics per task are of other layers ({what}): select the same layers.")
    return {task: _read(sets, own) for task, sets in state["sets"].items() if task in tasks}


def _read(values: Mapping[str, Tensor], own: Mapping[str, Buffers]) -> dict[str, Buffers]:
    found: dict[str, Buffers] = {}
    for name, buffers in own.items():
        found[name] = {key: values[f"{name}.{key}"] for key in buffers if f"{name}.{key}" in values}
        if {key: one.shape for key, one in found[name].items()} != {key: one.shape for key, one in buffers.items()}:
            raise ValueError(
                f"the saved statistics per task do not fit layer {named(name)} with "
                f"{counted(len(buffers['running_mean']), 'channel')}: they are of another model."
            )
    return found
