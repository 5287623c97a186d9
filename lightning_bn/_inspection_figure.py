"""Ranges of the running statistics in a file, layer by layer, as a figure."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_bn._inspection_table import verdict
from lightning_bn.functional._text import counted
from lightning_bn.functional.inspection.inspect import Inspection
from lightning_bn.functional.statistics.opened_files import shown

_MOST_ROWS = 400


def write_figure(found: Inspection, out: str | Path) -> None:
    """Draw ranges of mean and variance of the first set's layers, those at fault in red, into a file.

    Args:
        found: What :func:`~lightning_bn.functional.inspect_checkpoint` gave.
        out: Where to; the suffix says the format.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the suffix is of no format that it knows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'lightning-bn[plot]'.") from None

    layers = found.entries[0].layers[:_MOST_ROWS]
    faulty = {name for one in found.faults if one.entry == found.entries[0].key for name in one.layers}
    names = [shown(one.name, 50).replace("$", r"\$") for one in layers]
    figure = Figure(figsize=(8 + 0.07 * max(map(len, names), default=0), min(max(3.0, 1.6 + 0.2 * len(layers)), 40)))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for row, one in enumerate(layers):
        color = "tab:red" if one.name in faulty else "tab:blue"
        for axes, (low, middle, high) in ((left, one.mean), (right, one.var)):
            if math.isfinite(low):
                axes.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
                axes.plot([middle], [row], color=color, marker="o", markersize=3)
            else:
                axes.text(0.5, row, "not finite", color=color, fontsize=7, transform=axes.get_yaxis_transform())
    furthest = max((abs(value) for one in layers for value in one.mean if math.isfinite(value)), default=0.0)
    left.set(xlabel="running mean", xscale="symlog" if furthest > 100 else "linear")
    right.set(xlabel="running variance", xscale="symlog" if any(not one.var[0] > 0 for one in layers) else "log")
    size = 8 if len(layers) <= 60 else 4
    left.set_yticks(range(len(layers)), names, fontsize=size)
    left.set_ylim(len(layers) - 0.5, -0.5)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
    rest = len(found.entries[0].layers) - len(layers)
    title = verdict(found) + (f" (not drawn: {counted(rest, 'more layer')})" if rest else "")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    figure.supxlabel("from smallest to largest channel, the dot is the median; red: at fault", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
