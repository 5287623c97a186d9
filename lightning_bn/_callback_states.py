"""What callbacks of this package left in a checkpoint, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.freezing.report import FreezeReport
from lightning_bn.functional.monitoring.monitor_state import MonitorState

_MOST = 500
_MOST_WRITTEN = 1 << 24
_UNREADABLE = "its state cannot be read: another version wrote it, or it was changed."


def callbacks_in_words(states: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    """Return one sentence for each of this package's callbacks, by the key of its state.

    Args:
        states: Of all callbacks, as a checkpoint has them.
        about: Of the checkpoint: ``global_step``, where it is known.
    """
    found = {}
    for key, state in states.items():
        for kind, words in _WORDS.items():
            if key == kind or key.startswith(f"{kind}["):
                found[_printable(key)] = _printable(_safely(words, state, about))
    return found


def _safely(words: Callable[[Any, Mapping[str, Any]], str], state: Any, about: Mapping[str, Any]) -> str:
    try:
        return words(state, about) if _written_out(state, {}) <= _MOST_WRITTEN else _UNREADABLE
    except Exception:  # a state made to harm may have anything anywhere
        return _UNREADABLE


def _written_out(value: Any, known: dict[int, int]) -> int:
    """How long values are where each is written out wherever it stands: a list may stand twice in a list, and so on.

    Args:
        value: Of a callback's state.
        known: Lengths of those that were looked at.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_WRITTEN  # until it is known: what holds itself has no end
        inside = (*value, *value.values()) if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_written_out(one, known) for one in inside)
    return known[id(value)]


def _freezer(state: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    report = state.get("report")
    return f"{FreezeReport.from_state_dict(report)}." if report else "nothing had been frozen yet."


def _monitor(state: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    read = MonitorState.from_state_dict(state)
    if read is None or not len(read.history):
        return "no sample of drift yet."
    history = read.history
    last = history.values()[-1].nan_to_num(nan=-1.0)
    worst = int(last.argmax())
    said = [
        f"{counted(len(history), 'sample')} of drift from {read.measured_from.replace('_', ' ')}, steps "
        f"{history.steps[0]:,} to {history.steps[-1]:,}",
        f"in the last one {history.names[worst]} had the largest drift, {float(last[worst]):.2g}"
        if float(last[worst]) > 0
        else "in the last one no layer had moved",
    ]
    if read.warming_up:
        said.append(f"warming up: {quoted(sorted(read.warming_up), 3)}")
    if read.told:
        kinds = sorted({" of ".join(reversed(one)) for one in read.told})
        said.append(f"it had warned of {quoted(kinds, 3)}")
    return "; ".join(said) + "."


def _precise(state: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    step, validations = int(state.get("done_at_step", -1)), int(state.get("validations", 0))
    if step < 0:
        return "it had not recalibrated yet: the running statistics are the moving average of training."
    said = f"last recalibration at step {step:,}, {counted(validations, 'validation')} seen"
    saved = about.get("global_step")
    if not isinstance(saved, int):
        return f"{said}."
    if saved == step:
        return f"{said}; the checkpoint is of that step, with the statistics of these weights."
    return (
        f"{said}; the checkpoint is of step {saved:,}: its weights have changed since then, and its statistics are "
        "the moving average of training."
    )


def _tasks(state: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    if "sets" not in state:
        return "no statistics per task yet."
    names, default = [one for one in state["tasks"] if isinstance(one, str)], state["default"]
    said = [f"statistics of {counted(len(names), 'task')} in {counted(len(state['layers']), 'layer')}"]
    for task in names:
        counters = [int(one) for name, one in state["sets"].get(task, {}).items() if _is_counter(name, one)]
        own = "in the model's state dict" if task == default else f"{counted(max(counters, default=0), 'update')}"
        said.append(f"{task} ({own})")
    return f"{said[0]}: {', '.join(said[1:])}. How far they lie apart: lightning-bn tasks FILE."


def _is_counter(name: str, value: Any) -> bool:
    return name.endswith("num_batches_tracked") and isinstance(value, Tensor) and value.numel() == 1


def _printable(text: str) -> str:
    text = text if len(text) <= _MOST else text[:_MOST] + " ..."
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


_WORDS = {
    "BatchNormFreezer": _freezer,
    "BatchNormMonitor": _monitor,
    "PreciseBatchNorm": _precise,
    "TaskBatchNorm": _tasks,
}
