"""What freezing can break: the same fit with the backbone's weights training too, at a low and a high learning rate.

Frozen BatchNorm no longer rescales what a layer receives, so that large steps are no longer caught.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

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
            overrides = {"pretrained": str(folder / "pretrained" / "digits.ckpt"), "train_backbone": True, "lr": lr}
            curve, _, _ = fit_yaml("config.yaml", seed, folder, ["BatchNormFreezer"] if frozen else [], overrides)
            results[lr, frozen] = min(curve["parity_accuracy"])
    return results


def reading(seeds: Sequence[Worst]) -> str:
    """What was measured, and the advice if the numbers bear it out."""
    low, high = RATES

    def measured(lr: float) -> str:
        frozen, free = ([seed[lr, frozen] for seed in seeds] for frozen in (True, False))
        return f"at learning rate {lr}, {in_line(frozen)} % with frozen BatchNorm and {in_line(free)} % without"

    def loss(lr: float) -> float:
        return fmean(seed[lr, False] - seed[lr, True] for seed in seeds)

    advice = " With frozen BatchNorm, keep the learning rate low." if loss(high) > loss(low) else ""
    return (
        "\nWhat freezing can break: where the backbone's weights train too, the new task's worst epoch was, "
        f"{measured(low)}; {measured(high)}.{advice}"
    )
