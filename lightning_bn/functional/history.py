"""Drift over time: one row per sample, one column per layer, bounded in length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class DriftHistory:
    """Samples of drift, each the largest of every layer's channels.

    When it is full every second sample is dropped, so that it covers the whole run at half the resolution.

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

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, epoch: int, names: tuple[str, ...], largest: Tensor) -> None:
        """Adds one sample; layers that differ from those so far start a new history.

        Args:
            step: Optimizer steps taken.
            epoch: The running epoch.
            names: Of the layers.
            largest: The largest drift of each of them, ``(L,)``.
        """
        if self.names != names:
            self.names, self.steps, self.epochs, self._rows = names, [], [], []
        self.steps.append(step)
        self.epochs.append(epoch)
        self._rows.append(largest)
        if len(self) > self.most:
            self.steps, self.epochs, self._rows = self.steps[::2], self.epochs[::2], self._rows[::2]

    def mark(self, step: int, layer: str, event: str) -> None:
        """Notes that something happened to a layer: frozen, unfrozen, recalibrated, reset."""
        self.marks.append((step, layer, event))
        if len(self.marks) > 10 * self.most:
            self.marks = self.marks[::2]

    def values(self) -> Tensor:
        """The largest drift of each layer at each sample, shape ``(samples, layers)``, float64."""
        return torch.stack(self._rows) if self._rows else torch.zeros(0, len(self.names), dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, lists and numbers only."""
        return {
            "most": self.most,
            "names": list(self.names),
            "steps": list(self.steps),
            "epochs": list(self.epochs),
            "marks": [list(mark) for mark in self.marks],
            "values": self.values(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DriftHistory:
        """The history that :meth:`state_dict` described."""
        history = cls(state["most"])
        history.names = tuple(state["names"])
        history.steps, history.epochs = list(state["steps"]), list(state["epochs"])
        history.marks = [(int(step), str(layer), str(event)) for step, layer, event in state["marks"]]
        history._rows = list(state["values"])
        return history
