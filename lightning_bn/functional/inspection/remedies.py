"""How a set of layers in a file is recalibrated: the command for it, or what has to be done first."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_bn.functional.inspection.entries import Entry
from lightning_bn.functional.statistics.file_entries import DEEPEST
from lightning_bn.functional.statistics.opened_files import OpenedFile, shown


@dataclass(frozen=True)
class Recalibrating:
    """How one set of layers is recalibrated.

    Attributes:
        command: For a shell; empty where none does it.
        instead: One sentence: what to do where no command does it; else empty.
    """

    command: str
    instead: str


def keys_of(entries: Sequence[Entry]) -> Counter[str]:
    """Return the keys under which a recalibration finds sets of a file, and how many sets have each."""
    return Counter(_key(one) for one in entries if one.role != "task" and not one.prefix)


def recalibrating(entry: Entry, keys: Mapping[str, int], file: OpenedFile) -> Recalibrating:
    """Return how a set of layers is recalibrated.

    Args:
        entry: The set.
        keys: :func:`keys_of` all sets of the file.
        file: The file.
    """
    if entry.role == "task":
        return _without("For statistics of tasks: load them, call recalibrate(..., task_of=) in Python, and save.")
    if entry.prefix:
        return _without(
            f"For a copy inside a model: call recalibrate_checkpoint(..., prefix={shown(entry.prefix, 60)!r}) in "
            f"Python, with the copy as model."
        )
    key = _key(entry)
    if keys[key] > 1 or not _is_found(entry, file.content):
        return _without("Save the state dict in a file of its own first.")
    words = ["lightning-bn", "recalibrate", "--config", "train.yaml", "--ckpt_path", _name(file)]
    if "pytorch-lightning_version" in file.content and isinstance(file.content.get("state_dict"), dict):
        is_default = key == "state_dict"
    else:
        is_default = len(keys) == 1
    words += [] if is_default else ["--key", key]
    return Recalibrating(shlex.join([*words, "--out", _out(file)]), "")


def _key(entry: Entry) -> str:
    return ".".join(entry.path)


def _is_found(entry: Entry, content: Mapping[Any, Any]) -> bool:
    """Whether a recalibration looks for a state dict there: in dictionaries, and not too deep."""
    inner: Any = content
    for name in entry.path:
        inner = inner.get(name) if isinstance(inner, dict) else None
    return len(entry.path) <= DEEPEST and isinstance(inner, dict) and all(isinstance(name, str) for name in inner)


def _without(instead: str) -> Recalibrating:
    return Recalibrating("", instead)


def _name(file: OpenedFile) -> str:
    name = str(file.files[0] if len(file.files) == 1 else file.path)
    return name if name.isprintable() else "FILE"


def _out(file: OpenedFile) -> str:
    path = Path(_name(file))
    if len(file.files) > 1:  # a folder or an index; one file is written of all
        return f"{path.name.split('.')[0]}-precise{file.files[-1].suffix}"
    return f"{path.stem}-precise{path.suffix or '.ckpt'}"
