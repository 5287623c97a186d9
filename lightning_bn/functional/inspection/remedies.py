"""How a set of layers in a file is recalibrated: the command for it, or what has to be done first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_bn.functional.inspection.entries import Entry
from lightning_bn.functional.statistics.file_entries import state_dicts_in
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


def recalibrating(entry: Entry, entries: Sequence[Entry], file: OpenedFile) -> Recalibrating:
    """Return how a set of layers is recalibrated.

    Args:
        entry: The set.
        entries: All of the file.
        file: The file.
    """
    if entry.role == "task":
        return _without("For statistics of tasks: load them, call recalibrate(..., task_of=) in Python, and save.")
    if entry.prefix:
        return _without(
            f"For a copy inside a model: call recalibrate_checkpoint(..., prefix={shown(entry.prefix, 60)!r}) in "
            f"Python, with the copy as model."
        )
    if len(file.files) > 1:
        return _without("Put the shards into one file first.")
    keys = [".".join(one.path) for one in entries if one.role != "task" and not one.prefix]
    key, states = ".".join(entry.path), state_dicts_in(file.content)
    if key not in states or keys.count(key) > 1:
        return _without("Save the state dict in a file of its own first.")
    words = ["lightning-bn", "recalibrate", "--config", "train.yaml", "--ckpt_path", _name(file)]
    by_default = "state_dict" if "pytorch-lightning_version" in file.content and "state_dict" in states else None
    if key != by_default if by_default is not None else len(keys) > 1:
        words += ["--key", key]
    return Recalibrating(shlex.join([*words, "--out", _out(file)]), "")


def _without(instead: str) -> Recalibrating:
    return Recalibrating("", instead)


def _name(file: OpenedFile) -> str:
    name = str(file.files[0])
    return name if name.isprintable() else "FILE"


def _out(file: OpenedFile) -> str:
    path = Path(_name(file))
    return f"{path.stem}-precise{path.suffix or '.ckpt'}"
