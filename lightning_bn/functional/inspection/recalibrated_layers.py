"""Which layers of a file have the statistics of a recalibration, as the file says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_bn.functional.inspection.entries import Entry
from lightning_bn.functional.layers.names import without_wrappers
from lightning_bn.functional.statistics.callbacks_in_file import frozen_in
from lightning_bn.functional.statistics.claimed_values import distinct
from lightning_bn.functional.statistics.opened_files import OpenedFile
from lightning_bn.functional.statistics.recalibration_record import recalibrated_in, total_of


def recalibrated_layers(entry: Entry, file: OpenedFile) -> dict[str, tuple[int | None, int | None]]:
    """Return layers of a set, each with the batches and the samples that its statistics are from.

    A record of :func:`~lightning_bn.functional.recalibrate_checkpoint` counts for layers that still have what was
    written. PreciseBatchNorm leaves its step: it counts for a file of that step, without batches and samples, but not
    for layers that a BatchNormFreezer kept.

    Args:
        entry: The set.
        file: That it is in.

    Raises:
        ValueError: If the tensors claim more values than the file can hold.
    """
    is_models = entry.role == "task" or (entry.path == ("state_dict",) and not entry.prefix)
    if is_models and _is_precise(file.content):
        frozen = frozen_in(file.content)
        return {name: (None, None) for name in entry.layers if without_wrappers(name) not in frozen}
    record = recalibrated_in(file.content, file.metadata).get(".".join(entry.path), {})
    named = {name: parts for name, parts in entry.layers.items() if name in record}
    same = distinct(named, file.size)  # those of one layer under several names are added up once
    totals = {name: total_of(named[name]["running_mean"], named[name]["running_var"]) for name in {*same.values()}}
    return {
        name: (record[name].batches, record[name].samples) for name in named if record[name].total == totals[same[name]]
    }


def callbacks_of(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the states of callbacks in a checkpoint of Lightning, as they are saved."""
    found = content.get("callbacks")
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _is_precise(content: Mapping[Any, Any]) -> bool:
    """Whether PreciseBatchNorm replaced the running statistics at the step that the checkpoint is of."""
    step = content.get("global_step")
    states = [one for key, one in callbacks_of(content).items() if key.startswith("PreciseBatchNorm")]
    return any(isinstance(one, dict) and step is not None and one.get("done_at_step") == step for one in states)
