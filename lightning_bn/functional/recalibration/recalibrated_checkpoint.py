"""What became of a checkpoint that was recalibrated, as data and as one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.recalibration.result import Recalibration


@dataclass(frozen=True)
class RecalibratedCheckpoint:
    """What became of a checkpoint.

    Attributes:
        path: Where the new one is.
        averaged: Whether the weights in it are averages, as WeightAveraging saves them.
        recalibration: What was done to the statistics.
        found: Where in the file the model's weights were, if not under the same names; empty otherwise.
        entries_left: Other state dicts of the same layers in the file, by key, such as averaged weights; left as they
            were. What a callback keeps, and the weights beside Lightning's averages, are none of them.
        files: Names of the files whose average was recalibrated; empty for a single one.
        not_in_model: BatchNorm layers of the file that the model lacks, by their names in the file; left as they were.
        tasks_left: Tasks whose statistics lie in the file beside the model's own; left as they were.
        added: Layers of whose running statistics the file lacked some, by the model's names; they are in the new one.
        shards: How many files the checkpoint came in, which are one now; 0 where it was one.
    """

    path: Path
    averaged: bool
    recalibration: Recalibration
    found: str = ""
    not_in_model: tuple[str, ...] = ()
    tasks_left: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    entries_left: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    shards: int = 0

    def __str__(self) -> str:
        weights = "averaged weights" if self.averaged else "weights as saved"
        weights = f"average of {counted(len(self.files), 'file')}, {weights}" if self.files else weights
        said = f"{self.path.name}: {weights}{f' ({self.found})' if self.found else ''}, {self.recalibration}"
        if self.shards:
            said += f"; {counted(self.shards, 'shard')} written as one file"
        if self.added:
            said += f"; running statistics that the file lacked were added: {quoted(self.added)}"
        if self.not_in_model:
            layers = counted(len(self.not_in_model), "BatchNorm layer")
            said += f"; {layers} of the file not in the model and left as they were: {quoted(self.not_in_model)}"
        if self.entries_left:
            said += f"; {quoted(self.entries_left)} of the same file not changed (key= or --key chooses)"
        return f"{said}; {tasks_in_words(self.tasks_left)}" if self.tasks_left else said


def tasks_in_words(tasks: Sequence[str]) -> str:
    """Say which tasks of a file were left as they were."""
    return (
        f"the file has statistics of the task{'s' * (len(tasks) > 1)} {quoted(tasks, len(tasks))} too, which were left "
        f"as they were"
    )
