"""The figure: what happened to the old task, how its backbone drifted, and what validation saw."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forgetting import Outcome, by_row, worst
from lagging import EPOCHS, SETTINGS, Pair

WITHOUT, WITH = "#c8553d", "#2a6f97"
"""Colors: statistics that nobody looks after, and those that this package does."""
SHADES = ("#8c2f1b", "#c8553d", "#e8a598")
"""One for each BatchNorm layer of the backbone, where it is not frozen."""


def save(path: Path, forgot: Sequence[dict[str, Outcome]], lagged: Sequence[dict[str, Pair]]) -> Path:
    """Draws all panels and writes them to ``path``."""
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(12, 7.5), layout="constrained")
        axes = figure.subplot_mosaic("AAABBB;001122")
        draw_old_task(axes["A"], forgot)
        draw_drift(axes["B"], forgot)
        for panel, setting in zip("012", SETTINGS, strict=True):
            draw_validation(axes[panel], [pairs[setting.name] for pairs in lagged])
            axes[panel].set_title(f"Validation: {setting.name}\n({setting.details()})")
        axes["0"].set_ylabel("accuracy on ten digits, %")
        axes["0"].legend(loc="lower right", frameon=False)
        figure.savefig(path, dpi=150)
    return path


def draw_old_task(axes: Axes, seeds: Sequence[dict[str, Outcome]]) -> None:
    """A dot per seed and a line at the mean, for each row of table 1, against the accuracy before."""
    rows = by_row(seeds)
    before = fmean(outcomes["no callbacks"].old_before for outcomes in seeds)
    axes.axhline(before, color="gray", linestyle=":", zorder=0, label=f"before: {before:.1f} %")
    for position, outcomes in enumerate(rows.values()):
        after = [outcome.old[-1] for outcome in outcomes]
        color = WITH if all(outcome.statistics_kept for outcome in outcomes) else WITHOUT
        offsets = [position + 0.4 * (index + 0.5 - len(after) / 2) / len(after) for index in range(len(after))]
        axes.plot(offsets, after, "o", color=color, alpha=0.6)
        axes.hlines(fmean(after), position - 0.3, position + 0.3, color=color, linewidth=2)
        above = (position, max(after))
        axes.annotate(f"{fmean(after):.1f} %", above, (0, 8), textcoords="offset points", ha="center", color=color)
    axes.set_xticks(range(len(rows)), [fill(row, width=13) for row in rows])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy on the old task, %")
    axes.set_title("The old task, after only the head of a new one was trained\n(a dot per seed, a line at the mean)")
    axes.legend(loc="center", frameon=False)


def draw_drift(axes: Axes, seeds: Sequence[dict[str, Outcome]]) -> None:
    """Drift of the backbone's layers by step, as BatchNormMonitor saw it, not frozen and frozen."""
    rows = by_row(seeds)
    draw_histories(axes, rows["recalibration"], SHADES, "not frozen: {layer}")
    draw_histories(axes, rows["freezing"], (WITH,) * len(SHADES), "frozen: all of them")
    largest = worst(rows["recalibration"])
    place = (axes.dataLim.xmax, largest.max)
    axes.annotate(largest.in_words().removeprefix("network."), place, (0, 8), textcoords="offset points", ha="right")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(-0.001, 100)
    axes.set_yticks([0, 0.01, 0.1, 1, 10, 100], ["0", "0.01", "0.1", "1", "10", "100"])
    axes.set_xlabel("training step on the new task")
    axes.set_ylabel("a layer's largest drift, Jeffreys")
    axes.set_title("How far the backbone's running statistics moved\n(0.1 is variance x1.6, or the mean by 0.3 sigma)")
    by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(by_label.values(), by_label.keys(), frameon=False, loc="upper right", bbox_to_anchor=(1, 0.82))


def draw_histories(axes: Axes, outcomes: Sequence[Outcome], colors: Sequence[str], label: str) -> None:
    """A curve per layer: seeds thin, mean thick."""
    histories = [outcome.history for outcome in outcomes if outcome.history is not None]
    curves = torch.stack([history.values() for history in histories])
    steps, names = histories[0].steps, histories[0].names
    for name, color, of_seeds in zip(names, colors, curves.unbind(dim=2), strict=True):
        axes.plot(steps, of_seeds.T, color=color, linewidth=0.6, alpha=0.4)
        said = label.format(layer=name.removeprefix("network."))
        axes.plot(steps, of_seeds.mean(dim=0), color=color, linewidth=2.5, label=said)


def draw_validation(axes: Axes, pairs: Sequence[Pair]) -> None:
    """Accuracy by epoch with both kinds of statistics: seeds thin, mean thick."""
    epochs = range(1, EPOCHS + 1)
    kinds = {"moving average": (WITHOUT, "moving_average"), "precise statistics": (WITH, "precise")}
    for label, (color, attribute) in kinds.items():
        curves = [getattr(pair, attribute) for pair in pairs]
        for curve in curves:
            axes.plot(epochs, curve, color=color, linewidth=0.8, alpha=0.5)
        means = [fmean(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, means, color=color, linewidth=2.5, label=label)
    axes.set_xticks(epochs)
    axes.set_ylim(0, 104)
    axes.set_xlabel("epoch")
