"""Drift of running statistics as a torchmetrics Metric: for loops of one's own, and for ``self.log_dict``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_bn.functional._checks import check_choice, check_positive
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.statistics.drift_measures import MEASURES, Measure, of_standardized, standardized
from lightning_bn.functional.statistics.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.statistics.summary import percentile_95

_TOTAL, _LARGEST, _COUNT = 0, 1, 2


class BatchNormDrift(Metric):
    """How far running statistics are from a reference, over any number of updates and processes.

    ``compute`` gives a dict of 0-dimensional float64 tensors: ``<measure>_mean``, ``<measure>_p95`` and, with a
    ``threshold``, ``<measure>_share_above``, all three over the channels, each with its mean over updates and
    processes; and ``<measure>_max``, the largest of any channel at any update on any process. NaN if any is.

    The three sums behind it lie in one state of shape ``(3, C)``, C channels of all layers, so that processes exchange
    a single tensor. The model is not held: only names and copies of its statistics.

    Args:
        reference: What to measure from: a module with its statistics of this moment, or a snapshot.
        measure: As for :func:`~lightning_bn.functional.drift`; of signed measures the absolute value counts.
        threshold: If given, the share of channels above it is counted; also the line in the plot.
        modules: Which layers of a module, as for :func:`~lightning_bn.functional.batch_norm_layers`; None for all that
            keep running statistics.
        exclude: Which of them not.
        root: Put before every path.
        **kwargs: Of ``torchmetrics.Metric``: ``sync_on_compute``, ``process_group`` and so on.

    Attributes:
        reference: The snapshot that is measured from. It is not in checkpoints.

    Raises:
        SelectionError: If the selection means no layer with running statistics.
        ValueError: If the measure is unknown, or the threshold not positive.

    Example:
        >>> from torch import nn
        >>> layer = nn.BatchNorm1d(2)
        >>> drift = BatchNormDrift(layer, threshold=0.1)
        >>> layer.running_var.fill_(2.0)
        tensor([2., 2.])
        >>> drift.update(layer)
        >>> {name: round(float(value), 3) for name, value in drift.compute().items()}
        {'jeffreys_mean': 0.25, 'jeffreys_p95': 0.25, 'jeffreys_max': 0.25, 'jeffreys_share_above': 1.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(
        self,
        reference: nn.Module | Snapshot,
        measure: Measure = "jeffreys",
        threshold: float | None = None,
        modules: Patterns = None,
        *,
        exclude: Patterns = None,
        root: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("measure", measure, MEASURES)
        check_positive("threshold", threshold, none="to count no share above it")
        if not isinstance(reference, nn.Module | Snapshot):
            raise TypeError(f"reference={reference!r} must be a torch.nn.Module or a Snapshot.")
        self.measure: Measure = measure
        self.threshold = threshold
        self._selection = LayerSelection(modules, exclude, root)
        # Neither state nor buffer: `.half()` of a module that holds the metric would round it.
        self.reference = self._snapshot(reference)
        # A MetricCollection shares states between metrics whose states have the same names and, once, the same values.
        self._state = f"sums_{self._digest()}"
        channels = self.reference.layout.channels
        self.add_state(self._state, torch.zeros(3, channels, dtype=torch.float64), dist_reduce_fx=_merged)

    @property
    def sums(self) -> Tensor:
        """Of each channel, ``(3, C)``: drift summed over updates, the largest, and the number of updates."""
        sums: Tensor = getattr(self, self._state)
        return sums

    def update(self, model: nn.Module | Snapshot) -> None:
        """Measure the statistics of this moment.

        Args:
            model: The module, or a snapshot, with the layers of the reference.

        Raises:
            SelectionError: As for the constructor.
            ValueError: If its layers are not those of the reference; the layers that differ are named.
        """
        current = self._snapshot(model)
        self.reference = self.reference.to(current.mean.device)
        shift, ratio = standardized(self.reference, current)
        values = of_standardized(self.measure, shift, ratio, current.weight).abs().to(self.sums)
        largest = torch.maximum(self.sums[_LARGEST], values)
        setattr(self, self._state, torch.stack((self.sums[_TOTAL] + values, largest, self.sums[_COUNT] + 1)))

    def compute(self) -> dict[str, Tensor]:
        """The measure over all channels as described above; NaN before the first update."""
        values = self.sums[_TOTAL] / self.sums[_COUNT]
        largest = self._largest()
        found = {"mean": values.mean(), "p95": percentile_95(values), "max": largest.max()}
        if self.threshold is not None:
            share = (~(values <= self.threshold)).double().mean()
            found["share_above"] = torch.where(self.sums[_COUNT].max() > 0, share, torch.nan)
        return {f"{self.measure}_{name}": value for name, value in found.items()}

    def layers(self) -> dict[str, float]:
        """The largest drift of each layer's channels on this process, the worst first; NaN before the first update."""
        largest = self.reference.layout.max(self._largest()).tolist()
        pairs = list(zip(self.reference.names, largest, strict=True))
        # NaN first: a layer that cannot be measured is the worst there is.
        return dict(sorted(pairs, key=lambda pair: (pair[1] == pair[1], -pair[1] if pair[1] == pair[1] else 0.0)))

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: Any | None = None
    ) -> tuple[Any, Any]:
        """A figure that a person can read.

        Args:
            val: None draws the largest drift of each layer as bars, the worst on top, at most 30 of them. One result of
                ``compute`` or several, in order, are drawn as curves.
            ax: The ``matplotlib.axes.Axes`` to draw into; None makes a figure.

        Returns:
            The figure and the axes.

        Raises:
            ValueError: If there is no result in ``val``.
            ModuleNotFoundError: If matplotlib is not installed (``pip install lightning-bn[plot]``).
        """
        from lightning_bn.plotting import drift_bars, drift_curves

        if val is None:
            return drift_bars(self.layers(), self.measure, self.threshold, ax)
        results = [val] if isinstance(val, Mapping) else list(val)
        if not results:
            raise ValueError("BatchNormDrift.plot has no result to draw: give at least one.")
        # A share is no drift: it would need an axis of its own.
        names = [name for name in results[0] if not name.endswith("_share_above")]
        curves = {name: [float(result[name]) for result in results] for name in names}
        return drift_curves(curves, self.measure, self.threshold, ax)

    def _largest(self) -> Tensor:
        return torch.where(self.sums[_COUNT] > 0, self.sums[_LARGEST], torch.nan)

    def _digest(self) -> str:
        known = self.reference.to("cpu")
        parts = (self.measure, known.names, known.layout.sizes, known.mean.tolist(), known.var.tolist())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _snapshot(self, model: nn.Module | Snapshot) -> Snapshot:
        return model if isinstance(model, Snapshot) else snapshot_of(self._selection.tracked_layers(model))


def _merged(stacked: Tensor) -> Tensor:
    """Of states stacked along a new first dimension: totals and counts added up, the largest of the largest."""
    return torch.stack((stacked[:, _TOTAL].sum(0), stacked[:, _LARGEST].amax(0), stacked[:, _COUNT].sum(0)))
