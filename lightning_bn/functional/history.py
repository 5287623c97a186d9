"""Drift over time: one row per sample, one column per layer, bounded in length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bn.functional.drift import Measure, flat_drift
from lightning_bn.functional.snapshots import Snapshot


class DriftHistory:
    """Samples of drift, each the largest of every layer's channels.

    When it is full every second sample is dropped, so that it covers the whole run at half the resolution.

    Args:
        most: How many samples to keep at most.

    Attributes:
        names: The layers, in registration order; empty before the first sample.
        steps: Optimizer step of each sample.
        epochs: Epoch of each sample.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.names: tuple[str, ...] = ()
        self.steps: list[int] = []
        self.epochs: list[int] = []
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, epoch: int, reference: Snapshot, current: Snapshot, measure: Measure) -> None:
        """Adds one sample; layers that differ from those so far start a new history."""
        if self.names != current.names:
            self.names, self.steps, self.epochs, self._rows = current.names, [], [], []
        values = flat_drift(reference, current, measure).abs()
        largest = torch.stack([part.max() for part in values.split(current.channels)])
        self.steps.append(step)
        self.epochs.append(epoch)
        self._rows.append(largest.cpu())
        if len(self) > self.most:
            self.steps, self.epochs, self._rows = self.steps[::2], self.epochs[::2], self._rows[::2]

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
            "values": self.values(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DriftHistory:
        """The history that :meth:`state_dict` described."""
        history = cls(state["most"])
        history.names = tuple(state["names"])
        history.steps, history.epochs = list(state["steps"]), list(state["epochs"])
        history._rows = list(state["values"])
        return history
