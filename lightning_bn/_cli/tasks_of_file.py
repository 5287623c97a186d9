"""``lightning-bn tasks``: how far the tasks of a checkpoint lie apart, and what to do about it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_bn._cli.common import (
    FOUND,
    HEALTHY,
    add_json,
    add_parser_to,
    as_json,
    file_name,
    one_thread,
    print_parts,
)

if TYPE_CHECKING:
    from lightning_bn.functional.tasks.in_file import TasksInFile

_ABOUT = """\
Compare the running statistics of the tasks in a checkpoint, layer by layer, and
list the layers that need statistics of their own for each task.

FILE is a checkpoint that was saved with a TaskBatchNorm callback, or a file
with the state dict of a bank of task_statistics beside the model's own.
"""
_MORE = """\
examples:
  lightning-bn tasks multi.ckpt
  lightning-bn tasks multi.ckpt --above 0.3
  lightning-bn tasks multi.ckpt --json | jq '.banks[0].suggested'

The drift of a layer is the mean over its channels. The measures are those of
`lightning-bn diff`. Exit code 1 if the statistics of a task were never updated
or are not finite.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its options."""
    parser = add_parser_to(subparsers, "tasks", _ABOUT, _MORE)
    parser.add_argument("file", metavar="FILE", type=file_name, help="checkpoint with statistics of several tasks")
    parser.add_argument(
        "--above", type=float, metavar="X", help="drift from which on a layer needs a set for each task (default: 0.1)"
    )
    parser.add_argument("--measure", default="jeffreys", metavar="NAME", help="of drift (default: jeffreys)")
    parser.add_argument("--all", action="store_true", help="list all layers, not only the first 20")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    from lightning_bn.functional.tasks.drift import APART
    from lightning_bn.functional.tasks.in_file import tasks_in_file

    above = APART if options.above is None else options.above
    with one_thread():
        banks = tasks_in_file(options.file, options.measure)
    if options.json:
        print(
            as_json({"path": options.file, "measure": options.measure, "banks": [_plain(one, above) for one in banks]})
        )
    else:
        for bank in banks:
            print_parts(_report(bank, above, options.measure, len(bank.drift.layers) if options.all else 20))
    return FOUND if any(map(_faults, banks)) else HEALTHY


def _report(bank: TasksInFile, above: float, measure: str, most: int) -> Iterator[Any]:
    from lightning_bn._tables import LayerTable
    from lightning_bn._task_matrix import TaskMatrix
    from lightning_bn._task_table import task_drift_table

    counts = ", ".join(f"{task} {'-' if count is None else f'{count:,}'}" for task, count in bank.updates.items())
    yield LayerTable(f"Updates of each task's statistics: {counts}", [], above=[f"- {one}" for one in _faults(bank)])
    yield TaskMatrix(bank.drift, measure)
    yield task_drift_table(bank.drift, above, most)


def _plain(bank: TasksInFile, above: float) -> dict[str, Any]:
    return {
        "key": bank.key,
        "tasks": bank.tasks,
        "default": bank.default,
        "updates": bank.updates,
        "layers": bank.drift.layers,
        "drift": bank.drift.values.tolist(),
        "above": above,
        "suggested": bank.drift.suggest(above),
        "faults": _faults(bank),
    }


def _faults(bank: TasksInFile) -> list[str]:
    said = [
        f"The statistics of task {task!r} were never updated: they are what it began with. Was there a batch of it?"
        for task in bank.unseen
    ]
    if not bool(bank.drift.values.isfinite().all()):
        said.append("Statistics of a task are not finite: see lightning-bn inspect.")
    if bank.missing:
        said.append(
            f"Not one state dict of the file has the statistics of {bank.missing!r}, the default task: it is left out."
        )
    return said
