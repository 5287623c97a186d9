"""What a monitor saves and goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.statistics.snapshots import Snapshot


@dataclass(frozen=True)
class MonitorState:
    """The state of a monitor in the middle of a fit, or after it.

    Attributes:
        reference: What drift is measured from.
        measured_from: What that is: the ``reference`` of the session.
        history: The samples so far.
        warming_up: Layers that are warming up.
        measured_since: The step from which on layers are measured that were warming up, or were reset.
        warning: State of the threshold ``warn_above``.
        action: State of the threshold ``act_above``.
        told: Layers and kinds of findings that were said, with the task where it was one's.
        tasks: The same of each task's statistics: reference, history and layers.
    """

    reference: Snapshot
    measured_from: str
    history: DriftHistory
    warming_up: frozenset[str] = frozenset()
    measured_since: Mapping[str, int] = field(default_factory=dict)
    warning: Mapping[str, int] = field(default_factory=dict)
    action: Mapping[str, int] = field(default_factory=dict)
    told: frozenset[tuple[str, ...]] = frozenset()
    tasks: Mapping[str, MonitorState] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, strings, numbers, lists and dicts only."""
        nested = {"reference": self.reference.state_dict(), "history": self.history.state_dict()}
        sets = {"warming_up": sorted(self.warming_up), "told": [list(pair) for pair in sorted(self.told)]}
        state = {"format": 1, **vars(self), **nested, **sets}
        tasks = {task: one.state_dict() for task, one in state.pop("tasks").items()}
        return {**state, "tasks": tasks} if tasks else state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MonitorState | None:
        """Return the state that :meth:`state_dict` described; None without a reference, as before the first fit."""
        if state.get("reference") is None:
            return None
        return cls(
            Snapshot.from_state_dict(state["reference"]),
            state.get("measured_from", "fit_start"),
            DriftHistory.from_state_dict(state.get("history", {})),
            frozenset(state.get("warming_up", ())),
            dict(state.get("measured_since", {})),
            dict(state.get("warning", {})),
            dict(state.get("action", {})),
            frozenset(tuple(one) for one in state.get("told", ())),
            {task: one for task, saved in state.get("tasks", {}).items() if (one := cls.from_state_dict(saved))},
        )
