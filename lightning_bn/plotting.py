"""Figures, made of what the ground floor returns; matplotlib is an optional dependency."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lightning_bn.functional.history import DriftHistory

_COLOURS = {"frozen": "tab:blue", "unfrozen": "tab:cyan", "recalibrated": "tab:green", "reset": "tab:purple"}


def drift_figure(history: DriftHistory, measure: str, threshold: float | None = None) -> Any:
    """Drift of every layer over time: layers by depth against steps, with freezes and recalibrations marked.

    Args:
        history: Samples, at least one.
        measure: Its name, for the colour bar.
        threshold: Where the colour scale changes from blue to red; None for 0.1, a variance ratio of 1.56.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window.

    Raises:
        ValueError: If the history is empty.
        ImportError: If matplotlib is not installed (``pip install lightning-bn[plot]``).
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    if not len(history):
        raise ValueError("the history has no sample to draw")
    values = history.values().nan_to_num(nan=float("inf"))
    middle = threshold or 0.1
    finite = values[values.isfinite()]
    most = max(10 * middle, float(finite.max()) if finite.numel() else 0.0)
    longest, layers = max(map(len, history.names)), len(history.names)
    height = min(max(2.8, 1.6 + 0.24 * layers), 16)
    figure = Figure(figsize=(8 + 0.07 * min(longest, 60), height), layout="constrained")
    axes = figure.add_subplot()
    edges = _edges(history.steps)
    mesh = axes.pcolormesh(
        edges,
        [index - 0.5 for index in range(layers + 1)],
        values.clamp(max=most).T.numpy(),
        cmap="RdYlBu_r",
        norm=TwoSlopeNorm(middle, 0.0, most),
    )
    bar = figure.colorbar(mesh, ax=axes, extend="max", ticks=[0.0, middle / 2, middle, most / 2, most])
    bar.ax.set_yticklabels([f"{value:.2g}" for value in (0.0, middle / 2, middle, most / 2, most)])
    bar.set_label(f"{measure}, largest channel of the layer")
    _mark(axes, history)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("BatchNorm layer, first one on top")
    axes.set_title("How far running statistics are from their reference")
    every = max(1, -(-layers // 60))
    axes.set_yticks(range(0, layers, every), history.names[::every], fontsize=8 if layers <= 30 else 6)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.set_xlim(edges[0], edges[-1])
    return figure


def _edges(steps: list[int]) -> list[float]:
    """Where one sample's colour ends and the next one's begins."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - (middles[0] - steps[0]), *middles, steps[-1] + (steps[-1] - middles[-1])]


def _mark(axes: Any, history: DriftHistory) -> None:
    rows = {name: index for index, name in enumerate(history.names)}
    shown = [mark for mark in history.marks if mark[1] in rows]
    for event, colour in _COLOURS.items():
        at = [(step, rows[name]) for step, name, what in shown if what == event]
        if at:
            steps, layers = zip(*at, strict=True)
            axes.plot(steps, layers, "|", color=colour, markersize=9, markeredgewidth=1.6, label=event, clip_on=False)
    if shown:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4, fontsize=8, frameon=False)
