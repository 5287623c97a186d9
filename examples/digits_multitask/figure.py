"""The figure: what happened to the old task, how its backbone drifted, and what validation saw."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from forgetting import Outcome, by_row
from lagging import EPOCHS, SETTINGS, Pair
from matplotlib.axes import Axes

WITHOUT, WITH = "#c8553d", "#2a6f97"
"""Colours: without this package's callbacks, and with them."""


def save(path: Path, forgot: Sequence[dict[str, Outcome]], lagged: Sequence[dict[str, Pair]]) -> Path:
    """Draws all panels and writes them to ``path``."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11}
    with plt.rc_context(style):
        figure, axes = plt.subplot_mosaic(
            [["old task"] * 3 + ["drift"] * 3, [0, 0, 1, 1, 2, 2]], figsize=(12, 7.5), layout="constrained"
        )
        draw_old_task(axes["old task"], forgot)
        draw_drift(axes["drift"], forgot)
        for index, setting in enumerate(SETTINGS):
            draw_validation(axes[index], [pairs[setting.name] for pairs in lagged])
            axes[index].set_title(f"Validation: {setting.name}\n({setting.details()})")
        axes[0].set_ylabel("accuracy on ten digits, %")
        axes[0].legend(loc="lower right", frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def draw_old_task(axes: Axes, seeds: Sequence[dict[str, Outcome]]) -> None:
    """A dot per seed and a line at the mean, for each row of table 1, against the accuracy before."""
    rows = by_row(seeds)
    before = fmean(outcomes["no callbacks"].old_before for outcomes in seeds)
    axes.axhline(before, color="grey", linestyle=":", zorder=0)
    axes.text(len(rows) - 0.55, before - 2, f"before: {before:.1f} %", color="grey", ha="right", va="top")
    for position, (row, outcomes) in enumerate(rows.items()):
        after = [outcome.old[-1] for outcome in outcomes]
        colour = WITH if all(outcome.statistics_kept for outcome in outcomes) else WITHOUT
        offsets = [position + 0.3 * (index + 0.5 - len(after) / 2) / len(after) for index in range(len(after))]
        axes.plot(offsets, after, "o", color=colour, alpha=0.7)
        axes.hlines(fmean(after), position - 0.3, position + 0.3, color=colour, linewidth=2)
        axes.annotate(f"{fmean(after):.1f} %", (position + 0.32, fmean(after)), va="center", color=colour)
    axes.set_xticks(range(len(rows)), rows)
    axes.set_xlim(-0.6, len(rows) - 0.3)
    axes.set_ylim(0, 104)
    axes.set_ylabel("accuracy on the old task, %")
    axes.set_title("The old task after the new one was learned\n(a dot per seed, a line at the mean)")


def draw_drift(axes: Axes, seeds: Sequence[dict[str, Outcome]]) -> None:
    pass


def draw_validation(axes: Axes, pairs: Sequence[Pair]) -> None:
    """Accuracy by epoch with both kinds of statistics: seeds thin, mean thick."""
    epochs = range(1, EPOCHS + 1)
    kinds = {"moving average": (WITHOUT, "moving_average"), "precise statistics": (WITH, "precise")}
    for label, (colour, attribute) in kinds.items():
        curves = [getattr(pair, attribute) for pair in pairs]
        for curve in curves:
            axes.plot(epochs, curve, color=colour, linewidth=0.8, alpha=0.5)
        axes.plot(epochs, [fmean(values) for values in zip(*curves, strict=True)], color=colour, linewidth=2.5, label=label)
    axes.set_xticks(epochs)
    axes.set_ylim(0, 104)
    axes.set_xlabel("epoch")
