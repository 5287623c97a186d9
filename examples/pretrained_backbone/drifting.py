"""How far the running statistics of the 49 layers moved while only the heads trained, in plain units, by depth."""

from collections.abc import Sequence

import torch
from rich.table import Table
from torch import Tensor

from fine_tuning import HEADS, Outcome, Row
from lightning_bn.functional import drift, summarize
from tables import results_table

STAGES = {"stem and block 0": 0, "blocks 1–2": 2, "blocks 3–4": 4, "blocks 5–10": 10, "blocks 11–15 and head": 15}
"""By name, the last block of each; their images have 32, 16, 8, 4 and 2 pixels a side."""
ABOVE = 0.1
"""Of the Jeffreys divergence of a channel: a variance x1.6, or a mean 0.3 sigma off."""
OFF = ("mean off\nby, σ:", "variance\nx or ÷:")
"""In which units."""


def stage_of(layer: str) -> str:
    """Where in the network a layer lies: ``backbone._blocks.3._bn1`` in blocks 3–4."""
    parts = layer.split(".")
    last = {"_bn0": 0, "_bn1": 15}.get(parts[-1], 0) if "_blocks" not in parts else int(parts[-2])
    return next(stage for stage, end in STAGES.items() if last <= end)


def free(seeds: Sequence[dict[Row, Outcome]]) -> list[Outcome]:
    """The fits in which only the heads trained and BatchNorm was not frozen."""
    return [of_seed[HEADS, False] for of_seed in seeds]


def table(seeds: Sequence[dict[Row, Outcome]]) -> Table:
    """One line per stage, over the channels of all seeds."""
    result = results_table(
        "3. Only the heads trained, BatchNorm free: how far its statistics moved",
        ["by depth"],
        ["layers\nabove\n0.1", *(f"{what}\n{channels}" for what in OFF for channels in ("1 in 20", "at most"))],
    )
    for stage in STAGES:
        shifts, factors, above = [], [], []
        for outcome in free(seeds):
            jeffreys, shift, log_ratio = (
                {
                    layer: values
                    for layer, values in drift(outcome.before, outcome.after, measure).items()
                    if stage_of(layer) == stage
                }
                for measure in ("jeffreys", "mean_shift", "log_variance_ratio")
            )
            shifts += [values.abs() for values in shift.values()]
            factors += [values.abs().exp() for values in log_ratio.values()]
            above += [bool((values > ABOVE).any()) for values in jeffreys.values()]
        of_stage = f"{sum(above) / len(seeds):.0f} of {len(above) // len(seeds)}"
        numbers = (f"{number:.2g}" for values in (shifts, factors) for number in in_twenty_and_most(torch.cat(values)))
        result.add_row(stage, of_stage, *numbers)
    return result


def in_twenty_and_most(values: Tensor) -> tuple[float, float]:
    """What one value in twenty is above, and the largest."""
    return float(values.quantile(0.95)), float(values.max())


def reading(seeds: Sequence[dict[Row, Outcome]]) -> str:
    """How many layers had moved at which step, and the worst channel."""
    outcomes = free(seeds)
    histories = [outcome.history for outcome in outcomes]
    steps = histories[0].steps
    layers = torch.stack([(history.values() > ABOVE).sum(dim=1).double() for history in histories]).mean(dim=0)
    shown = [min(range(len(steps)), key=lambda index: abs(steps[index] - step)) for step in (10, 20, 40, steps[-1])]
    counts = ", ".join(f"{layers[index]:.0f} after {steps[index]} steps" for index in shown)
    worst = max((summarize(outcome.before, outcome.after) for outcome in outcomes), key=lambda summary: summary.max)
    return (
        f"1 in 20: one channel of twenty is further off. Of the {len(histories[0].names)} layers, those with a channel "
        f"above {ABOVE} (a variance x1.6, or a mean 0.3 sigma off): {counts}. The worst channel: {worst.in_words()}."
    )
