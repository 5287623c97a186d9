"""What freezing can break: the same fit with the backbone's weights training too, at a low and a high learning rate.

Frozen BatchNorm no longer rescales what a layer receives, so that large steps are no longer caught.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tables import in_line
from yaml_fit import fit_yaml

RATES = (0.005, 0.05)
FITS = 2 * len(RATES)
"""Fits per seed."""

Worst = dict[tuple[float, bool], float]
"""By learning rate and whether BatchNorm was frozen: the worst epoch on the new task, in percent."""


def run(seed: int, folder: Path, announce: Callable[[str], None]) -> Worst:
    """config.yaml with ``train_backbone: true``, from the checkpoint that experiment 1 left in ``folder``."""
    results = {}
    for lr in RATES:
        for frozen in (False, True):
            announce(f"parity, whole network, lr {lr}{', frozen' if frozen else ''}")
            overrides = {"pretrained": str(folder / "pretrained.ckpt"), "train_backbone": True, "lr": lr}
            curve, _, _ = fit_yaml(
                "config.yaml", seed, folder, ["BatchNormFreezer"] if frozen else [], overrides
            )
            results[lr, frozen] = min(curve["parity_accuracy"])
    return results


def reading(seeds: Sequence[Worst]) -> str:
    """What was measured, in two sentences."""

    def measured(lr: float, frozen: bool) -> str:
        return in_line([seed[lr, frozen] for seed in seeds])

    each = "; ".join(f"lr {lr}: {measured(lr, True)} frozen, {measured(lr, False)} not" for lr in RATES)
    return (
        "What freezing can break: with the backbone's weights training too, its BatchNorm frozen or not, the new task's "
        f"worst epoch was, in %, at {each}. Train below frozen BatchNorm at a low learning rate."
    )
