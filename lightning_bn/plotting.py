"""Figures, made of what the ground floor returns; matplotlib is an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from math import inf, isfinite
from typing import Any

from lightning_bn.functional._text import counted
from lightning_bn.functional.monitoring.history import FROM_THE_START, DriftHistory
from lightning_bn.functional.tasks.drift import APART, TaskDrift

_TITLE = "How far running statistics are from their reference"
_MARKS = {
    "frozen": ("s", "white"),
    "unfrozen": ("o", "white"),
    "recalibrated": ("^", "lime"),
    "reset": ("X", "magenta"),
}


def drift_figure(history: DriftHistory, measure: str, threshold: float | None = None) -> Any:
    """Drift of every layer over time: layers by depth against steps, with freezes and recalibrations marked.

    Layers that are frozen from the start have a black square at the left edge.

    Args:
        history: Samples, at least one.
        measure: Its name, for the color bar.
        threshold: Where the color scale changes from blue to red; None for 0.1, a variance ratio of 1.56.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window.

    Raises:
        ValueError: If the history is empty.
        ImportError: If matplotlib is not installed (``pip install lightning-bn[plot]``).
    """
    _check_matplotlib()
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, TwoSlopeNorm
    from numpy import ma

    if not len(history):
        raise ValueError("the history has no sample to draw")
    middle = threshold or 0.1
    # Fixed, so that one layer that explodes does not make all others look alike; beyond it is one color.
    most = 10 * middle
    values = history.values()
    unmeasured = values.isnan()
    values = values.nan_to_num(nan=most, posinf=most).clamp(max=most)
    longest, layers = max(map(len, history.names)), len(history.names)
    height = min(max(3.4, 2.2 + 0.24 * layers), 16)
    figure, axes = _figure_for(None, (8 + 0.07 * min(longest, 60), height))
    columns, rows = _edges(history.steps), [index - 0.5 for index in range(layers + 1)]
    cmap, norm = colormaps["RdYlBu_r"].with_extremes(bad="black"), TwoSlopeNorm(middle, 0.0, most)
    shown = ma.masked_array(values.T.numpy(), unmeasured.T.numpy())
    mesh = axes.pcolormesh(columns, rows, shown, cmap=cmap, norm=norm)
    patches = {"not a number": "black"} if unmeasured.any() else {}
    warming_up = _warming_up(history).T
    if warming_up.any():
        patches = {"warming up": "lightgray", **patches}
        gray = ma.masked_array(warming_up, ~warming_up)
        axes.pcolormesh(columns, rows, gray, cmap=ListedColormap(["lightgray"]))
    ticks = [0.0, middle / 2, middle, most / 2, most]
    bar = figure.colorbar(mesh, ax=axes, extend="max", ticks=ticks)
    bar.ax.set_yticklabels([f"{value:.3g}" for value in ticks])
    bar.set_label(f"{measure}\n(largest channel)", fontsize=8)
    _mark(figure, axes, history, patches)
    dropped = (
        f"\nleft out, since close to others: {counted(history.marks_dropped, 'mark')}" if history.marks_dropped else ""
    )
    axes.set(xlabel="optimizer step", ylabel="BatchNorm layer, first one on top", title=f"{_TITLE}{dropped}")
    every = max(1, -(-layers // 60))
    axes.set_yticks(range(0, layers, every), history.names[::every], fontsize=8 if layers <= 30 else 6)
    axes.set(xlim=(columns[0], columns[-1]), ylim=(rows[-1], rows[0]))
    return figure


def task_drift_figure(drift: TaskDrift, above: float = APART) -> Any:
    """How far tasks lie apart in each layer: layers by depth against pairs of tasks, on a logarithmic scale.

    Args:
        drift: What :func:`~lightning_bn.functional.task_drift` gave.
        above: Where the color scale changes from blue to red: the drift from which on a layer needs a set for each
            task, as for ``TaskDrift.suggest``.

    Returns:
        A ``matplotlib.figure.Figure`` that belongs to no window.

    Raises:
        ImportError: If matplotlib is not installed (``pip install lightning-bn[plot]``).
    """
    _check_matplotlib()
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from numpy import array, clip, ma, nan_to_num

    pairs, names = drift.pairs(), [name or "(the model itself)" for name in drift.layers]
    labels = [" / ".join(pair) for pair in pairs]
    # Fixed, so that one layer that is far off does not make all others look alike; beyond it is one color.
    least, most = above / 100, above * 100
    values = array([*pairs.values()]).T
    shown = ma.masked_invalid(clip(nan_to_num(values, nan=float("nan"), posinf=most), least, most))
    width = max(0.3 * len(labels), 3) + 2.4 + 0.07 * min(max(map(len, names)), 60)
    height = 0.24 * len(names) + 1.9 + 0.075 * max(map(len, labels))
    figure, axes = _figure_for(None, (width, min(max(height, 3.4), 17)))
    cmap = colormaps["RdYlBu_r"].with_extremes(bad="black")
    mesh = axes.pcolormesh(shown, cmap=cmap, norm=LogNorm(least, most), edgecolors="white", linewidth=0.5)
    ticks = [least, above / 10, above, above * 10, most]
    bar = figure.colorbar(mesh, ax=axes, extend="both", ticks=ticks)
    bar.ax.set_yticklabels([f"{value:.3g}" for value in ticks])
    bar.ax.minorticks_off()
    bar.set_label(f"drift (mean over channels)\nabove {above:g}: a set for each task", fontsize=8)
    every = max(1, -(-len(names) // 60))
    rows = range(0, len(names), every)
    axes.set_yticks([row + 0.5 for row in rows], names[::every], fontsize=8 if len(names) <= 30 else 6)
    upright = max(map(len, labels)) * len(labels) > 30
    axes.set_xticks([column + 0.5 for column in range(len(labels))], labels, fontsize=8, rotation=90 if upright else 0)
    axes.set(ylim=(len(names), 0), ylabel="BatchNorm layer, first one on top", title="How far tasks lie apart")
    if ma.getmaskarray(shown).any():
        from matplotlib.patches import Patch

        figure.legend(handles=[Patch(color="black", label="not a number")], loc="outside lower center", fontsize=8)
    return figure


def drift_bars(
    layers: Mapping[str, float], measure: str, threshold: float | None = None, ax: Any = None, most: int = 30
) -> tuple[Any, Any]:
    """The drift of each layer as a bar, the first one on top.

    Args:
        layers: Drift by name, the worst first.
        measure: Its name, for the axis.
        threshold: Where a line is drawn; bars beyond it are red.
        ax: The ``matplotlib.axes.Axes`` to draw into; None makes a figure that belongs to no window.
        most: How many layers to draw at most.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed (``pip install lightning-bn[plot]``).
    """
    shown = dict(list(layers.items())[:most])
    longest = max(map(len, shown), default=0)
    figure, axes = _figure_for(ax, (6 + 0.07 * min(longest, 60), max(2.2, 1.4 + 0.24 * len(shown))))
    finite = [value for value in shown.values() if isfinite(value)]
    beyond = 1.1 * max([*finite, threshold or 0.0]) or 1.0
    for row, value in enumerate(shown.values()):
        known = isfinite(value)
        red = not known or (threshold is not None and value > threshold)
        axes.barh(
            row, value if known else beyond, color="firebrick" if red else "steelblue", hatch=None if known else "//"
        )
        if not known:
            axes.annotate("not finite", (0, row), (4, 0), textcoords="offset points", va="center", color="white")
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_yticks(range(len(shown)), [name or "(the model itself)" for name in shown], fontsize=8)
    rest = len(layers) - len(shown)
    title = f"{_TITLE}\n{counted(rest, 'more layer')} moved less" if rest else _TITLE
    axes.set(xlim=(0, beyond), ylim=(len(shown) - 0.5, -0.5), xlabel=f"{measure} (largest channel)", title=title)
    return figure, axes


def drift_curves(
    curves: Mapping[str, Sequence[float]], measure: str, threshold: float | None = None, ax: Any = None
) -> tuple[Any, Any]:
    """Results over time, one line each.

    Args:
        curves: Values in order, by the name of the line.
        measure: Its name, for the axis.
        threshold: Where a line is drawn.
        ax: The ``matplotlib.axes.Axes`` to draw into; None makes a figure that belongs to no window.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: If matplotlib is not installed (``pip install lightning-bn[plot]``).
    """
    figure, axes = _figure_for(ax, (7, 4))
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
    if threshold is not None:
        axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="result", ylabel=measure, title=_TITLE)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return figure, axes


def _check_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("a figure needs matplotlib: pip install 'lightning-bn[plot]'.")


def _figure_for(ax: Any, size: tuple[float, float]) -> tuple[Any, Any]:
    _check_matplotlib()
    from matplotlib.figure import Figure

    if ax is not None:
        return ax.get_figure(), ax
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _warming_up(history: DriftHistory) -> Any:
    """Return where a layer was warming up: an array of samples by layers."""
    from numpy import array, zeros

    steps = array(history.steps)
    found = zeros((len(steps), len(history.names)), dtype=bool)
    began: dict[str, float] = {}
    for step, name, event in [*history.marks, *((inf, name, "warmed up") for name in history.names)]:
        if event == "warming up":
            began[name] = step
        elif event == "warmed up" and name in began and name in history.names:
            found[(steps >= began.pop(name)) & (steps < step), history.names.index(name)] = True
    return found


def _edges(steps: list[int]) -> list[float]:
    """Where one sample's color ends and the next one's begins."""
    first, last = (steps[1] - steps[0], steps[-1] - steps[-2]) if len(steps) > 1 else (1, 1)
    return [(a + b) / 2 for a, b in pairwise([steps[0] - first, *steps, steps[-1] + last])]


def _mark(figure: Any, axes: Any, history: DriftHistory, patches: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    rows = {name: index for index, name in enumerate(history.names)}
    # One line instead of a mark on each of them, which would cover what is below.
    most = max(2, len(rows) // 2)
    size, edge = (6, 0.6) if len(rows) <= 40 else (3, 0.3)
    outlined = {"markeredgecolor": "black", "markeredgewidth": edge, "clip_on": False}
    still = sorted({rows[name] for _, name, event in history.marks if event == FROM_THE_START and name in rows})
    if still:
        # Each of them, at the edge, where it covers nothing.
        left = [_edges(history.steps)[0]] * len(still)
        axes.plot(left, still, "s", color="black", label=FROM_THE_START, markersize=size, **outlined)
    for event, (shape, color) in _MARKS.items():
        by_step: dict[int, set[int]] = {}
        for step, name, what in history.marks:
            if what == event and name in rows:
                by_step.setdefault(step, set()).add(rows[name])
        lines = [step for step, layers in by_step.items() if len(layers) > most]
        at = [(step, layer) for step, layers in by_step.items() if len(layers) <= most for layer in sorted(layers)]
        if at:
            axes.plot(*zip(*at, strict=True), shape, color=color, label=event, markersize=size, **outlined)
        for step in lines:
            axes.axvline(step, color="black", linewidth=1.6)
            label = None if step != lines[0] else event if not at else f"{event}, most layers"
            axes.axvline(step, color=color, linewidth=0.8, label=label)
        for step in lines:
            # On top of the frame, where they cover nothing.
            axes.plot(step, -0.5, shape, color=color, markersize=5, **outlined)
    handles, _ = axes.get_legend_handles_labels()
    handles += [Patch(color=color, label=label) for label, color in patches.items()]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
