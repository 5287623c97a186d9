"""Which of the state dicts in a checkpoint belongs to a model, and under which of its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.names import without_wrappers

Shapes: TypeAlias = Mapping[str, torch.Size | None]
"""Names in a model's state dict with the shapes wanted; None is any."""

DEEPEST = 3
"""Keys one inside the other under which a state dict is looked for."""
_MOST_ENTRIES = 10_000


@dataclass(frozen=True)
class FileEntry:
    """The state dict in a file that belongs to a model.

    Attributes:
        key: Of the entry, outer keys first with dots between; empty for the file itself.
        state: The entry, as it lies in the content of the file.
        prefix: What the file has before the model's names.
        names: Of the model, each with the name that the file has for it.
    """

    key: str
    state: dict[str, Any]
    prefix: str
    names: dict[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.state[self.name_of(name)]

    def get(self, name: str, default: Any = None) -> Any:
        """What the file has under the model's ``name``."""
        return self.state.get(self.name_of(name), default)

    def name_of(self, name: str) -> str:
        """The name in the file, for any name of the modules that were looked for."""
        if name in self.names:
            return self.names[name]
        module = name.rpartition(".")[0]
        there = next((theirs for own, theirs in self.names.items() if own.rpartition(".")[0] == module), None)
        return name if there is None else there[: len(there) - len(there.rpartition(".")[2])] + name.rpartition(".")[2]

    def __str__(self) -> str:
        """What was found otherwise than under the same name in the file or its ``state_dict``; empty if nothing was."""
        said = [f"entry {self.key!r}"] if self.key not in ("", "state_dict") else []
        own, theirs = next(iter(self.names.items()))
        return ", ".join(said + [f"{own!r} read from {theirs!r}"] * (own != theirs))


def state_dicts_in(content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return every state dict in what a file holds, by key: dictionaries with tensors under strings."""
    found: dict[str, dict[str, Any]] = {}
    _add_state_dicts(found, content, "", 0, set())
    return found


def find_entry(
    content: dict[str, Any], wanted: Shapes, failed: str, *, key: str | None = None, prefix: str | None = None
) -> FileEntry:
    """Return the one state dict in a file that has all of what is wanted.

    Names count without the components that wrappers add. Where the file has exactly one entry, and in it one place,
    that fits, it is taken: also where the file's names have something before those of the model, or lack what the
    model has before all of its own. The same names go before others, and of Lightning's checkpoints only
    ``state_dict`` is looked at unless ``key`` is given.

    Args:
        content: What the file holds.
        wanted: What it has to have.
        failed: Begins the sentence of an error.
        key: The entry to take, outer keys first with dots between; ``""`` for the file itself; None looks for it.
        prefix: What the names in the file have before those of the model; None looks for it.

    Raises:
        ValueError: If nothing fits, or several places do and neither ``key`` nor ``prefix`` tells which.
    """
    entries = state_dicts_in(content)
    if key is not None and key not in entries:
        raise ValueError(f"{failed}: it has no state dict under key={key!r}, only under {quoted(list(entries))}.")
    if key is not None:
        chosen = {key: entries[key]}
    elif "pytorch-lightning_version" in content and "state_dict" in entries:
        chosen = {"state_dict": entries["state_dict"]}
    else:
        chosen = entries
    # A dictionary may stand under many keys.
    once = dict({id(state): (key, state) for key, state in reversed(chosen.items())}.values())
    places = {id(state): _fitting(state, wanted) for state in once.values()}
    fitting = [replace(found, key=key) for key, state in chosen.items() for found in places[id(state)]]
    asked = [found for found in fitting if prefix is None or _same(found.prefix, prefix)]
    if prefix is None and len(asked) > 1:
        asked = [found for found in asked if _same_names(found)] or asked
    if len(asked) == 1:
        return asked[0]
    if not fitting:
        raise ValueError(
            f"{failed}: {_nearest(once, wanted)}; the file is of another model, or of a part of this one: then pass "
            "or select that part."
        )
    where = "" if prefix is None else f" with prefix={prefix!r}"
    ways = " or ".join(f"key={found.key!r} with prefix={found.prefix!r}" for found in fitting[:5])
    why = "several of its state dicts do" if asked else "another place would"
    raise ValueError(f"{failed}{where}: {why}; choose {ways}, or save the right state dict alone in a file.")


def _add_state_dicts(
    found: dict[str, dict[str, Any]], content: Mapping[Any, Any], key: str, depth: int, barren: set[tuple[int, int]]
) -> None:
    """Add those in a dictionary; ``barren`` are dictionaries, at their depths, that have none, however often met.

    Raises:
        ValueError: If there are more than any checkpoint has.
    """
    before = len(found)
    if any(isinstance(value, Tensor) for value in content.values()) and all(isinstance(name, str) for name in content):
        found[key] = content  # type: ignore[assignment]
    if len(found) > _MOST_ENTRIES:
        raise ValueError(f"there are more than {_MOST_ENTRIES:,} state dicts in the file: pass one of them.")
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, dict) and depth < DEEPEST and (id(value), depth) not in barren:
            _add_state_dicts(found, value, f"{key}.{name}" if key else name, depth + 1, barren)
    if len(found) == before:
        barren.add((id(content), depth - 1))


def _fitting(state: dict[str, Any], wanted: Shapes) -> list[FileEntry]:
    """The places in a state dict, of no key yet, that have all that is wanted: as names are, else without wrappers."""
    for theirs, own in (
        ({name: name for name in state}, {name: name for name in wanted}),
        ({without_wrappers(name): name for name in state}, {name: without_wrappers(name) for name in wanted}),
    ):
        if len(theirs) < len(state) or len(set(own.values())) < len(own):
            continue  # two names have become one
        start = _common_path(list(own.values()))
        anchor = min(own.values(), key=len)[len(start) :]
        ends = [name for name in theirs if name == anchor or name.endswith(f".{anchor}")]
        found = []
        for before in (name[: len(name) - len(anchor)] for name in ends):
            places = {name: theirs.get(before + short[len(start) :]) for name, short in own.items()}
            if all(there is not None and _fits(state[there], wanted[name]) for name, there in places.items()):
                prefix = before.removesuffix(start)
                found.append(FileEntry("", state, prefix, {name: str(there) for name, there in places.items()}))
        if found:
            return found
    return []


def _fits(value: Any, shape: torch.Size | None) -> bool:
    return shape is None or getattr(value, "shape", None) == shape


def _common_path(names: list[str]) -> str:
    """What all names have before them, by whole components; a layer alone keeps its own name."""
    paths = {tuple(name.split(".")[:-1]) for name in names}
    if len(paths) == 1:
        paths = {path[:-1] for path in paths}
    shared = takewhile(lambda components: len(set(components)) == 1, zip(*paths, strict=False))
    return "".join(f"{components[0]}." for components in shared)


def _same_names(found: FileEntry) -> bool:
    return all(without_wrappers(own) == without_wrappers(there) for own, there in found.names.items())


def _same(found: str, asked: str) -> bool:
    return without_wrappers(found.rstrip(".")) == without_wrappers(asked.rstrip("."))


def _nearest(entries: Mapping[str, Mapping[str, Any]], wanted: Shapes) -> str:
    """What the entry that has most of the names lacks, or has in another shape."""
    start = _common_path(list(wanted))

    def lacking(key: str) -> list[str]:
        ends = tuple(f".{name}" for name in entries[key])
        return [name for name in wanted if not any(there.endswith(f".{name[len(start) :]}") for there in ends)]

    key = min(entries, key=lambda entry: len(lacking(entry)))
    missing = lacking(key)
    where = f"its entry {key!r}" if key else "it"
    if missing:
        return f"{where} lacks {quoted(missing)}"
    others = [name for name, shape in wanted.items() if not _fits(entries[key].get(name), shape)]
    return f"{where} has other shapes of {quoted(others)}"
