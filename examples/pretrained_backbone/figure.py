"""The figure: the 49 layers by depth against the steps of a fit in which only the heads trained."""

from pathlib import Path

from fine_tuning import Outcome
from lightning_bn.plotting import drift_figure


def save(path: Path, outcome: Outcome) -> Path:
    """The package's own figure of the monitor's history, in the size of a page."""
    history = outcome.history
    figure = drift_figure(history, "Jeffreys divergence from ImageNet's statistics; 0.1 is a variance x1.6")
    axes = figure.axes[0]
    figure.set_size_inches(8, 7.2)
    axes.set_yticks(range(len(history.names)), map(short, history.names), fontsize=6)
    axes.set_xlabel("optimizer step\nbn0, bn1, bn2: after a block's expanding, depthwise and projecting convolution")
    axes.set_title("None of the backbone's weights trains: its running statistics move")
    figure.savefig(path, dpi=150)
    return path


def short(layer: str) -> str:
    """``block 3 bn1`` for ``network.backbone._blocks.3._bn1``."""
    name = layer.removeprefix("network.backbone._")
    outside = {"bn0": "stem bn0", "bn1": "head bn1"}
    return outside.get(name) or name.replace("blocks.", "block ").replace("._", " ")
