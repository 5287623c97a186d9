"""Drift over time: one row per sample, one column per layer, bounded in length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bn.functional._text import counted

FROM_THE_START = "frozen from the start"
"""The event of a layer that is frozen when a session begins."""
_FEWEST_TO_JUMP = 5
"""Samples that tell a jump from what came before it."""
_STAY = (FROM_THE_START, "warming up", "warmed up")


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
        marks: What happened to layers: step, name and event; bounded in number too.
        marks_dropped: How many there were beside these.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.names: tuple[str, ...] = ()
        self.steps: list[int] = []
        self.epochs: list[int] = []
        self.marks: list[tuple[int, str, str]] = []
        self.marks_dropped = 0
        self._rows: list[Tensor] = []
        self._stride = 1
        self._seen = 0

    def __repr__(self) -> str:
        span = f", steps {self.steps[0]:,} to {self.steps[-1]:,}" if self.steps else ""
        return f"DriftHistory({counted(len(self), 'sample')} of {counted(len(self.names), 'layer')}{span})"

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
        """Note an event of a layer: frozen (from the start), unfrozen, recalibrated, reset, warming up, warmed up.

        Of too many those go whose steps lie closest together: all of a step or none, so that what happened to all
        layers at once still looks so. The newest ones stay, and what is frozen from the start. Beginnings and ends of
        warming up go last, the oldest first.
        """
        self.marks.append((step, layer, event))
        if len(self.marks) > 10 * max(self.most, len(self.names)):
            self._thin(len(self.marks) * 3 // 4)

    def _thin(self, most: int) -> None:
        steps, found = sorted({step for step, _, _ in self.marks}), len(self.marks)
        apart = 1
        while len(self.marks) > most and len(steps) > 2:
            # From the oldest one on: what stays now stays until it is too close to the one before it.
            apart, last, kept = 2 * apart, steps[0], {steps[0], steps[-1]}
            for step in steps:
                if step - last >= apart:
                    kept.add(last := step)
            self.marks = [mark for mark in self.marks if mark[0] in kept or mark[2] in _STAY]
            steps = [step for step in steps if step in kept]
        lasting = [mark for mark in self.marks if mark[2] == FROM_THE_START]
        others = [mark for mark in self.marks if mark[2] != FROM_THE_START]
        self.marks = lasting + others[-max(most - len(lasting), 1) :]
        self.marks_dropped += found - len(self.marks)

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
            "marks_dropped": self.marks_dropped,
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
        history.marks_dropped = state.get("marks_dropped", 0)
        history._stride, history._seen = state.get("stride", 1), state.get("seen", len(rows))
        return history
