"""Experiment 2: validation with the moving average against validation with precise statistics.

Each setting trains the ten digits twice from the same seed, with PreciseBatchNorm and without. Training is the same to
the last bit; only the statistics that validation sees differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from pytorch_lightning import Callback, seed_everything
from pytorch_lightning.callbacks import EMAWeightAveraging
from rich.table import Table

from data import DigitsData
from fitting import fit
from lightning_bn import PreciseBatchNorm
from model import DigitsModule
from tables import results_table, spread

EPOCHS = 6
SHOWN = (1, 2, 3, 6)
"""Epochs in the table; the figure has all."""


@dataclass(frozen=True)
class Setting:
    """How the digits are trained.

    Attributes:
        name: For tables and figures.
        batch_size: Images per batch.
        lr: Learning rate.
        decay: Of an exponential moving average of the weights, which is what is validated; None without one.
    """

    name: str
    batch_size: int
    lr: float
    decay: float | None = None

    def details(self) -> str:
        """The numbers, in a few words."""
        return f"batch {self.batch_size}, lr {self.lr}" if self.decay is None else f"EMA, decay {self.decay}"

    def callbacks(self) -> list[Callback]:
        """Those that belong to the setting, with and without precise statistics."""
        return [] if self.decay is None else [EMAWeightAveraging(decay=self.decay)]


SETTINGS = (
    Setting("few large updates", batch_size=128, lr=0.1),
    Setting("averaged weights", batch_size=32, lr=0.1, decay=0.995),
    Setting("many small updates", batch_size=8, lr=0.003),
)

FITS = 2 * len(SETTINGS)
"""Fits per seed."""


@dataclass(frozen=True)
class Pair:
    """Validation accuracy by epoch of the same training, in percent, with two kinds of statistics.

    Attributes:
        moving_average: With the running statistics as training left them.
        precise: With PreciseBatchNorm.
        same_training: Whether both trainings ended with bit-identical weights.
    """

    moving_average: list[float]
    precise: list[float]
    same_training: bool


def run(seed: int, announce: Callable[[str], None]) -> dict[str, Pair]:
    """Every setting, without and with PreciseBatchNorm."""
    pairs = {}
    for setting in SETTINGS:
        announce(f"{setting.name}, moving average")
        plain, curve = train(setting, seed)
        announce(f"{setting.name}, precise statistics")
        precise, precise_curve = train(setting, seed, PreciseBatchNorm(num_batches=1000 // setting.batch_size))
        pairs[setting.name] = Pair(
            moving_average=curve,
            precise=precise_curve,
            same_training=all(map(torch.equal, plain.parameters(), precise.parameters())),
        )
    return pairs


def train(setting: Setting, seed: int, *callbacks: Callback) -> tuple[DigitsModule, list[float]]:
    """One training, and its validation accuracy by epoch."""
    seed_everything(seed, verbose=False)
    module = DigitsModule(lr=setting.lr)
    curve = fit(module, DigitsData(batch_size=setting.batch_size), EPOCHS, [*setting.callbacks(), *callbacks])
    return module, curve["digit_accuracy"]


def table(seeds: Sequence[dict[str, Pair]]) -> Table:
    """For each setting two lines, moving average and precise, by epoch."""
    result = results_table(
        "2. Validation with the moving average against precise statistics, % by epoch",
        ["how it trains", "statistics"],
        [f"epoch {epoch}" for epoch in SHOWN],
    )
    for setting in SETTINGS:
        pairs = [pairs[setting.name] for pairs in seeds]
        average = [spread([pair.moving_average[epoch - 1] for pair in pairs]) for epoch in SHOWN]
        precise = [spread([pair.precise[epoch - 1] for pair in pairs]) for epoch in SHOWN]
        result.add_row(f"{setting.name}\n[dim]{setting.details()}[/dim]", "moving average", *average)
        result.add_row("", "precise", *precise, end_section=True)
    return result


def reading(seeds: Sequence[dict[str, Pair]]) -> str:
    """What the table says, from its own numbers."""
    gains = {setting.name: fmean(gain(pairs[setting.name]) for pairs in seeds) for setting in SETTINGS}
    same = [pair.same_training for pairs in seeds for pair in pairs.values()]
    listed = ", ".join(f"{round(value, 1) + 0.0:+.1f} points for {name}" for name, value in gains.items())
    return (
        f"Same weights, other statistics (training was bit-identical in {sum(same)} of {len(same)} pairs). Averaged "
        f"over the epochs, precise statistics read {listed}."
    )


def gain(pair: Pair) -> float:
    """Points of accuracy that precise statistics read above the moving average, mean over the epochs."""
    return fmean(pair.precise) - fmean(pair.moving_average)
