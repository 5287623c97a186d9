"""Every state dict with BatchNorm layers inside what a file holds, however deep, and whose it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lightning_bn.functional.layers.names import without_wrappers
from lightning_bn.functional.statistics.claimed_values import unreadable
from lightning_bn.functional.statistics.opened_files import PARTS, shown

Role: TypeAlias = Literal["model", "averaged", "in training", "task"]
DEEPEST = 8
"""Keys one inside the other under which BatchNorm layers are looked for."""
_MOST_VISITED = 200_000
_AVERAGED = re.compile(
    r"(?:^|_)(?:ema|swa|avg|averaged?|averages|teacher)(?:_|$|[0-9])|^(?:ema|swa)|(?:ema|swa)$", re.I
)


@dataclass(frozen=True)
class Entry:
    """One set of BatchNorm layers in a file.

    Attributes:
        path: Keys of the state dict in the file, outer ones first; empty for the file itself.
        prefix: What the names of its layers have before them there, with the dot; only of copies inside a model.
        role: ``"model"``; ``"averaged"``, weights that are an average of others; ``"in training"``, those they are an
            average of; ``"task"``, statistics of one task.
        layers: Tensors of each layer by the names of torch's.
        broken: Why tensors that look like a layer's are none, by name.
        foreign: The same of what is most likely of another kind, which is no fault.
    """

    path: tuple[str, ...]
    prefix: str
    role: Role
    layers: Mapping[str, Mapping[str, Tensor]]
    broken: Mapping[str, str]
    foreign: Mapping[str, str]

    @property
    def key(self) -> str:
        """As a reader writes it: keys with dots between, then the prefix."""
        return ".".join(self.path) + (f" [{self.prefix}*]" if self.prefix else "")


def entries_in(content: Mapping[Any, Any]) -> list[Entry]:
    """Return every set of BatchNorm layers in what a file holds, the model's own first."""
    averaged = "averaging_state" in content or "current_model_state" in content
    found = []
    for path, state in _states(content):
        for prefix, names in _copies(state).items():
            layers, broken, foreign = _layers(state, names)
            if layers or broken or foreign:
                role = "averaged" if prefix or _is_average(state) else _role(path, averaged)
                found.append(Entry(path, prefix, role, layers, broken, foreign))
    order = {"model": 0, "averaged": 1, "in training": 2, "task": 3}
    # An average that Lightning saves in the place of the model is the model that a user loads.
    return sorted(found, key=lambda one: (one.path != ("state_dict",) or bool(one.prefix), order[one.role], one.path))


def deeper_than_searched(content: Mapping[Any, Any]) -> str:
    """Return the key of a state dict with BatchNorm layers that is too deep to be found; empty if there is none."""
    return next((".".join(path) for path, _ in _states(content, _MOST_VISITED) if len(path) > DEEPEST), "")


def averages_without_statistics(content: Mapping[Any, Any], model: Entry) -> Iterator[Entry]:
    """Yield averaged weights of most of the model's layers that have no running statistics beside them."""
    layers = {without_wrappers(name.removeprefix(model.prefix)) for name in model.layers}
    for path, state in _states(content, parts=("weight",)):
        names = {without_wrappers(name.rpartition(".")[0]) for name in state if _part(name) == "weight"}
        has_statistics = any(_part(name) in PARTS[:2] for name in state)
        if any(map(_AVERAGED.search, path)) and 2 * len(layers & names) > len(layers) and not has_statistics:
            yield Entry(path, "", "averaged", {name: {} for name in sorted(layers & names)}, {}, {})


def _states(
    content: Mapping[Any, Any], deepest: int = DEEPEST, parts: tuple[str, ...] = PARTS[:2]
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Dictionaries with tensors of these names, by default of BatchNorm layers, each once, outer ones first."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while waiting and len(seen) < _MOST_VISITED:
        path, value = waiting.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            if any(_part(name) in parts for name, one in value.items() if isinstance(one, Tensor)):
                yield path, value
            inside = value.items()
        else:
            inside = enumerate(value)  # type: ignore[assignment]
        if len(path) < deepest:
            below = [(name, one) for name, one in inside if isinstance(one, Mapping | list | tuple)]
            waiting += [((*path, shown(name)), one) for name, one in below]


def _part(name: object) -> str:
    return name.rpartition(".")[2] if isinstance(name, str) else ""


def _copies(state: Mapping[Any, Any]) -> dict[str, list[str]]:
    """Names of layers by the copy they belong to: under the prefix of an average, or under none."""
    found: dict[str, list[str]] = {}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in state if _part(name) in PARTS[:2])
    averages = {name.rpartition(".")[0] for name in state if _part(name) == "n_averaged"} - {""}
    for layer in layers:
        parts = layer.split(".")
        ends = [index + 1 for index, part in enumerate(parts[:3]) if _AVERAGED.search(part)]
        ends += [one.count(".") + 1 for one in averages if layer.startswith(one + ".")]
        prefix = "".join(f"{part}." for part in parts[: min(ends)]) if ends and min(ends) < len(parts) else ""
        found.setdefault(prefix, []).append(layer)
    # One that is all there is, as where a file was saved from an average, is no copy beside the model.
    return found if "" in found or len(found) > 1 else {"": [layer for names in found.values() for layer in names]}


def _is_average(state: Mapping[Any, Any]) -> bool:
    return "n_averaged" in state


def _role(path: tuple[str, ...], averaged: bool) -> Role:
    if path[:1] == ("callbacks",) and len(path) == 4 and path[2] in ("sets", "current_sets"):
        return "task"
    if path == ("state_dict",) and averaged:
        return "averaged"
    if path == ("current_model_state",):
        return "in training"
    return "averaged" if any(map(_AVERAGED.search, path)) else "model"


def _layers(
    state: Mapping[Any, Any], names: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], dict[str, str]]:
    layers: dict[str, dict[str, Tensor]] = {}
    broken: dict[str, str] = {}
    foreign: dict[str, str] = {}
    for name in names:
        keys = {part: f"{name}.{part}" if name else part for part in PARTS}
        parts = {part: state[key] for part, key in keys.items() if isinstance(state.get(key), Tensor)}
        running = [parts[part] for part in PARTS[:2] if part in parts]
        why = next((f"{part} {said}" for part in parts if (said := unreadable(parts[part])) is not None), "")
        if len(running) < 2:
            has, lacks = PARTS[:2] if PARTS[0] in parts else PARTS[1::-1]
            broken[name] = f"has {has} without {lacks}"
        elif why:
            broken[name] = why
        elif running[0].shape != running[1].shape:
            broken[name] = f"has running_mean of {_shape(running[0])} channels and running_var of {_shape(running[1])}"
        elif running[0].dim() != 1 or not len(running[0]):
            foreign[name] = f"has running statistics of shape {_shape(running[0])}, BatchNorm has one value per channel"
        else:
            layers[name] = _fitting(parts)
    return layers, broken, foreign


def _fitting(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without weights and counters of other shapes, which are not of this layer."""
    shape = parts["running_mean"].shape
    return {part: one for part, one in parts.items() if (one.numel() == 1 if part == PARTS[2] else one.shape == shape)}


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "no dimension"


def bare(entry: Entry) -> dict[str, str]:
    """Return the names of an entry's layers by what they are without wrappers and prefix."""
    return {without_wrappers(name.removeprefix(entry.prefix)): name for name in entry.layers}
