"""Drift over time: one row per sample, one column per layer, bounded in length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FROM_THE_START = "frozen from the start"
"""The event of a layer that is frozen when a session begins."""
_FEWEST_TO_JUMP = 5
"""Samples that tell a jump from what came before it."""


class DriftHistory:
    """Samples of drift, each the largest of every layer's channels.

    When it is full every second sample is dropped, and from then on only every second one of those that come stays, so
    that it covers the whole run evenly; the newest one is always there.

    Args:
        most: How many samples to keep at most.

    Attributes:
        names: The layers, in registration order; empty before the first sample.
        steps: Optimizer step of each sample.
        epochs: Epoch of each sample.
        marks: What happened to layers: step, name and event.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.names: tuple[str, ...] = ()
        self.steps: list[int] = []
        self.epochs: list[int] = []
        self.marks: list[tuple[int, str, str]] = []
        self._rows: list[Tensor] = []
        self._stride = 1
        self._seen = 0

    def __repr__(self) -> str:
        span = f", steps {self.steps[0]:,} to {self.steps[-1]:,}" if self.steps else ""
        return f"DriftHistory({len(self)} samples of {len(self.names)} layers{span})"

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, epoch: int, names: tuple[str, ...], largest: Tensor) -> None:
        """Add one sample; layers that differ from those so far start a new history.

        Args:
            step: Optimizer steps taken.
            epoch: The running epoch.
            names: Of the layers.
            largest: The largest drift of each of them, ``(L,)``.
        """
        if self.names != names:
            self.names = names
            self._keep(slice(0))
            self._stride, self._seen = 1, 0
        # Between two that stay, the newest one is there until the next one comes.
        if (self._seen - 1) % self._stride:
            self._keep(slice(0, -1))
        if len(self) >= self.most:
            self._keep(slice(0, None, 2))
            self._stride *= 2
        self.steps.append(step)
        self.epochs.append(epoch)
        self._rows.append(largest)
        self._seen += 1

    def _keep(self, which: slice) -> None:
        self.steps, self.epochs, self._rows = self.steps[which], self.epochs[which], self._rows[which]

    def mark(self, step: int, layer: str, event: str) -> None:
        """Note an event of a layer: frozen (from the start), unfrozen, recalibrated, reset, warming up, warmed up."""
        self.marks.append((step, layer, event))
        if len(self.marks) > 10 * self.most:
            lasting = [mark for mark in self.marks if mark[2] == FROM_THE_START]
            self.marks = lasting + [mark for mark in self.marks if mark[2] != FROM_THE_START][::2]

    def jumped_at(self, layer: str) -> int | None:
        """Return the step at about which a layer's drift jumped to where it is now; None if it did not, or grew slowly.

        The last sample at which the drift was near its median, provided that the time before it was at least four
        times as long as the jump took, and that it was never half as far as now: neither noise nor a power of time, as
        in fine-tuning, grows that fast.
        """
        if len(self) < _FEWEST_TO_JUMP:
            return None
        curve = self.values()[:, self.names.index(layer)]
        usual, now = float(curve[:-1].median()), float(curve[-1])
        if not now > 2 * usual:
            return None
        near = int((curve <= usual + 0.2 * (now - usual)).nonzero().flatten()[-1])
        if not now > 2 * float(curve[: near + 1].max()):
            return None
        start = self.steps[near]
        return start if start - self.steps[0] >= 4 * (self.steps[-1] - start) else None

    def values(self) -> Tensor:
        """Return the largest drift of each layer at each sample, shape ``(samples, layers)``, float64."""
        return torch.stack(self._rows) if self._rows else torch.zeros(0, len(self.names), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, lists and numbers only."""
        lists = {name: list(getattr(self, name)) for name in ("names", "steps", "epochs")}
        return {
            "format": 1,
            **lists,
            "most": self.most,
            "marks": [list(mark) for mark in self.marks],
            "stride": self._stride,
            "seen": self._seen,
            "values": self.values(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DriftHistory:
        """Return the history that :meth:`state_dict` described; what is missing is as in a new one."""
        history = cls(state.get("most", 1000))
        history.names = tuple(state.get("names", ()))
        # Rows without a step, or steps without a row, could not be shown.
        rows = list(state.get("values", ()))
        history.steps = list(state.get("steps", ()))[: len(rows)]
        history._rows = rows[: len(history.steps)]
        history.epochs = list(state.get("epochs", [0] * len(rows)))
        history.marks = [(int(step), str(layer), str(event)) for step, layer, event in state.get("marks", ())]
        history._stride, history._seen = state.get("stride", 1), state.get("seen", len(rows))
        return history
