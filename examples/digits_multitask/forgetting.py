"""Experiment 1: none of the backbone's weights trained, and the old task still died.

Phase A (pretrain.yaml) teaches backbone and digit head the ten digits. Phase B (config.yaml) trains only a new head,
parity, on images from another sensor. Both run from their YAML files; the rows differ in the callbacks alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill

import torch
from rich.table import Table
from torch import nn

from lightning_bn import BatchNormMonitor, TaskBatchNorm
from lightning_bn.functional import DriftSummary, summarize, take_snapshot
from lightning_bn.functional.monitoring.history import DriftHistory
from model import DigitsModule
from tables import in_line, results_table, spread
from yaml_fit import fit_yaml

BACKBONE = "network.backbone"

ROWS = {
    "no callbacks": (),
    "freezing": ("BatchNormFreezer", "BatchNormMonitor"),
    "recalibration": ("PreciseBatchNorm", "BatchNormMonitor"),
    "both": ("BatchNormFreezer", "PreciseBatchNorm", "BatchNormMonitor"),
    "per-task statistics": ("TaskBatchNorm",),
}
"""Which of this package's callbacks are left in config.yaml, or added to it."""
KEEPING = {"BatchNormFreezer", "TaskBatchNorm"}
"""Callbacks that keep the old task's statistics."""

FITS = 1 + len(ROWS)
"""Fits per seed."""


@dataclass(frozen=True)
class Outcome:
    """One fit of phase B; accuracies in percent.

    Attributes:
        old_before: On the old task, before the fit.
        old: On the old task, by epoch.
        new: On the new task, by epoch.
        weights_kept: Whether every weight of the backbone is bit-identical.
        statistics_kept: Whether every running statistic of the backbone is bit-identical.
        drift: Of the backbone's running statistics, from before the fit to after it.
        history: The same layer by layer during the fit, as BatchNormMonitor saw it; None where it was off.
    """

    old_before: float
    old: list[float]
    new: list[float]
    weights_kept: bool
    statistics_kept: bool
    drift: DriftSummary
    history: DriftHistory | None


def run(seed: int, folder: Path, announce: Callable[[str], None]) -> dict[str, Outcome]:
    """Phase A once, then phase B once per row from the same checkpoint."""
    announce("ten digits")
    learned, _, _ = fit_yaml("pretrain.yaml", seed, folder)
    checkpoint = str(folder / "pretrained" / "digits.ckpt")
    outcomes = {}
    for row, switched_on in ROWS.items():
        announce(f"parity, {row}")
        added = [own_statistics()] if "TaskBatchNorm" in switched_on else []
        model = {"pretrained": checkpoint}
        curve, trainer, after = fit_yaml("config.yaml", seed, folder, switched_on, model, added)
        before = DigitsModule(pretrained=checkpoint)
        old, new = (take_snapshot(module, root=BACKBONE) for module in (before, after))
        outcomes[row] = Outcome(
            old_before=learned["digit_accuracy"][-1],
            old=curve["digit_accuracy"],
            new=curve["parity_accuracy"],
            weights_kept=same_weights(before.network.backbone, after.network.backbone),
            statistics_kept=old.same_bits(new),
            drift=summarize(old, new),
            history=next((c.history for c in trainer.callbacks if isinstance(c, BatchNormMonitor)), None),
        )
    return outcomes


def own_statistics() -> TaskBatchNorm:
    """The old task owns what lies in the layers, the new one gets a set of its own beside it."""
    return TaskBatchNorm(tasks=["digit", "parity"], root="network", modules=["backbone"])


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether all parameters are equal, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def table(seeds: Sequence[dict[str, Outcome]]) -> Table:
    """One line per row: the old task before and after, the new task, and what happened to the backbone."""
    result = results_table(
        "1. None of the backbone's weights trained, and the old task still died",
        ["callbacks"],
        ["old task\nbefore, %", "old task\nafter, %", "new task\nlast\nepoch, %", "new task\nworst\nepoch, %"],
    )
    result.add_column("backbone:\nlargest\ndrift")
    result.add_column("kept,\nbit for\nbit")
    for row, outcomes in by_row(seeds).items():
        largest = worst(outcomes)
        drifted = f"var x{largest.variance_ratio:.1f}\nmean {largest.mean_shift:+.1f} σ"
        result.add_row(
            fill(row, width=13),
            spread([outcome.old_before for outcome in outcomes]),
            spread([outcome.old[-1] for outcome in outcomes]),
            spread([outcome.new[-1] for outcome in outcomes]),
            spread([min(outcome.new) for outcome in outcomes]),
            "none" if kept(outcomes) else drifted,
            ("yes" if kept(outcomes) else "NO") if KEEPING & {*ROWS[row]} else "–",
        )
    return result


def reading(seeds: Sequence[dict[str, Outcome]]) -> str:
    """What the table says, from its own numbers."""
    rows = by_row(seeds)
    fits = [outcome for outcomes in rows.values() for outcome in outcomes]
    bare, frozen, own = rows["no callbacks"], rows["freezing"], rows["per-task statistics"]
    price, own_price = (
        fmean(a.new[-1] - b.new[-1] for a, b in zip(bare, others, strict=True)) for others in (frozen, own)
    )
    unchanged = sum(outcome.weights_kept for outcome in fits)
    return (
        f"The backbone's weights are bit-identical after {unchanged} of {len(fits)} fits. Without callbacks its "
        f"BatchNorm statistics moved (most at {worst(bare).in_words()}), and the old task lost {lost(bare)} points; "
        f"with freezing it lost {lost(frozen)}. For that the new task {'pays' if price >= 0 else 'gains'} "
        f"{abs(price):.1f} points. With statistics for each task the old one lost {lost(own)}, and the new one "
        f"{'pays' if own_price >= 0 else 'gains'} {abs(own_price):.1f}."
    )


def by_row(seeds: Sequence[dict[str, Outcome]]) -> dict[str, list[Outcome]]:
    """The outcomes of all seeds, row by row."""
    return {row: [outcomes[row] for outcomes in seeds] for row in ROWS}


def kept(outcomes: Sequence[Outcome]) -> bool:
    """Whether no seed's running statistics moved."""
    return all(outcome.statistics_kept for outcome in outcomes)


def worst(outcomes: Sequence[Outcome]) -> DriftSummary:
    """The largest drift in any seed."""
    return max((outcome.drift for outcome in outcomes), key=lambda drift: drift.max)


def lost(outcomes: Sequence[Outcome]) -> str:
    """Points of accuracy that the old task lost."""
    return in_line([outcome.old_before - outcome.old[-1] for outcome in outcomes])
