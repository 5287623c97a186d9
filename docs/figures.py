"""The figures of the pages: ``python docs/figures.py`` draws them all into ``docs/images``, in about a minute.

``python docs/figures.py what_moves`` draws one. It needs what the examples need:
``pip install 'lightning-bn[examples]'``.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm
from lightning_bn.functional import describe, freeze_batch_norm

IMAGES = Path(__file__).parent / "images"
sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "digits_multitask"))

import fitting  # noqa: E402
import lagging  # noqa: E402
from data import DigitsData  # noqa: E402
from network import conv_block  # noqa: E402

MOVES, STAYS = "#c8553d", "#2a6f97"
"""Colors: what moves, or is not looked after; what stays, or is."""
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}

WITH = {"batch": "the batch", "running": "running statistics"}
STEPS = 60
"""Of each training in the first figure."""
CHANGE, FREEZE, LR, GAIN = 120, 180, 0.005, 2.0
"""Of the third: the steps at which the data change and at which a layer is frozen, learning rate, the new gain."""
NUMBERS = {
    1: (20, "encoder.1.1"),
    2: (20, "decoder.0.1"),
    3: (CHANGE, "encoder.2.1"),
    4: (FREEZE + 14, "encoder.3.1"),
    5: (230, "decoder.1.1"),
}
"""Where the numbers stand that the page explains: optimizer step and layer."""
SWITCHES: dict[str, Callable[[nn.Module], object]] = {
    ".train()": lambda layer: layer.train(),
    ".eval()": lambda layer: layer.eval(),
    "requires_grad_(False)": lambda layer: layer.requires_grad_(False),
    "track_running_stats = False later": lambda layer: setattr(layer, "track_running_stats", False),
    "freeze_batch_norm": freeze_batch_norm,
}


class Course(NamedTuple):
    """One layer over the steps of a training: what it normalized with, its running mean and its weight."""

    normalizes_with: str
    mean: list[float]
    weight: list[float]


def courses() -> dict[str, Course]:
    """The same layer, which knows data of mean 0, after each switch: trained with data of mean 3."""
    return {name: course(switch) for name, switch in SWITCHES.items()}


def course(switch: Callable[[nn.Module], object]) -> Course:
    """One of them; the loss asks for outputs that are twice as wide."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm1d(1)
    for _ in range(100):
        layer(torch.randn(64, 1, generator=generator))
    switch(layer)
    [behavior] = describe(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.02)
    mean, weight = [layer.running_mean.item()], [layer.weight.item()]
    for _ in range(STEPS):
        noise = torch.randn(64, 1, generator=generator)
        optimizer.zero_grad()
        loss = (layer(3 + noise) - 2 * noise).square().mean()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
        mean.append(layer.running_mean.item())
        weight.append(layer.weight.item())
    return Course(behavior.normalizes_with, mean, weight)


def what_moves() -> Figure:
    """Running mean and weight of one layer by training step, after each switch, a row for each of them."""
    found = courses()
    figure = Figure(figsize=(7, 8.5), layout="constrained")
    rows = figure.subplots(len(found), 2, sharex=True, sharey="col")
    for (left, right), (name, one) in zip(rows, found.items(), strict=True):
        draw_course(left, one.mean)
        draw_course(right, one.weight)
        left.set_title(f"{name}: normalizes with {WITH[one.normalizes_with]}", fontsize=12, loc="left", weight="bold")
        left.set(ylabel="running mean", ylim=(-1.8, 4.2))
        right.set(ylabel="weight", ylim=(0, 2.3))
        left.axhline(3, color="gray", linestyle=":", zorder=0)
    rows[0][0].annotate("mean of the new data", (0, 3), (0, 4), textcoords="offset points", color="gray")
    for axes in rows[-1]:
        axes.set_xlabel("training step")
    return figure


def draw_course(axes: Axes, values: Sequence[float]) -> None:
    """A curve, and in words whether it moves."""
    moves = len(set(values)) > 1
    axes.plot(values, color=MOVES if moves else STAYS, linewidth=3, linestyle="-" if moves else "--")
    words = {"ha": "right", "va": "center", "fontsize": 12, "weight": "bold", "color": MOVES if moves else STAYS}
    axes.annotate("moves" if moves else "stays", (STEPS, values[-1]), (0, -15), textcoords="offset points", **words)


class Losses(Callback):
    """The mean training loss of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self._batches: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:
        self._batches.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(fmean(self._batches))
        self._batches = []


def validation_curve(seeds: Sequence[int] = range(3)) -> Figure:
    """Training loss and validation accuracy of the main example, with and without precise statistics."""
    settings = [setting for setting in lagging.SETTINGS if setting.name != "many small updates"]
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    (losses, accuracies) = figure.subplots(2, len(settings), sharex=True, sharey="row", height_ratios=(2, 3))
    for column, setting in enumerate(settings):
        for label, color, precise in (("moving average", MOVES, False), ("PreciseBatchNorm", STAYS, True)):
            fits = [fit_of(setting, seed, precise) for seed in seeds]
            style = "--" if precise else "-"
            epochs = range(1, lagging.EPOCHS + 1)
            for axes, curves in zip((losses[column], accuracies[column]), zip(*fits, strict=True), strict=True):
                axes.plot(epochs, [*zip(*curves, strict=True)], color=color, linewidth=0.8, alpha=0.5, linestyle=style)
                mean = [fmean(values) for values in zip(*curves, strict=True)]
                axes.plot(epochs, mean, color=color, linewidth=3, linestyle=style, label=label)
        losses[column].set_title(f"{setting.name}\n({setting.details()})", fontsize=12)
        accuracies[column].set(xlabel="epoch", xticks=epochs, ylim=(0, 104))
    losses[0].set(ylabel="training loss", ylim=(0, None))
    accuracies[0].set_ylabel("validation accuracy, %")
    accuracies[0].legend(loc="lower right", frameon=False)
    return figure


def fit_of(setting: lagging.Setting, seed: int, precise: bool) -> tuple[list[float], list[float]]:
    """Training loss and validation accuracy by epoch of one fit."""
    losses, batches = Losses(), 1000 // setting.batch_size
    callbacks = [losses, PreciseBatchNorm(num_batches=batches)] if precise else [losses]
    _, accuracies = lagging.train(setting, seed, *callbacks)
    return losses.epochs, accuracies


class Network(LightningModule):
    """Digits by an encoder of five BatchNorm layers that saw other data before, and a new decoder of two."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 8, 16, 16, 32, 32, 32, 32)
        blocks = [conv_block(*pair, stride=1) for pair in pairwise(widths)]
        self.encoder, self.decoder = nn.Sequential(*blocks[:5]), nn.Sequential(*blocks[5:])
        self.head = nn.Linear(32, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        # From the middle of the fit on the sensor has another gain.
        gain = 1.0 if self.global_step < CHANGE else GAIN
        features = self.decoder(self.encoder(gain * images)).mean((2, 3))
        return nn.functional.cross_entropy(self.head(features), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def fitted(folder: Path) -> BatchNormMonitor:
    """The monitor of a fit in which all that a heatmap can show happens."""
    seed_everything(0, verbose=False)
    images, labels = DigitsData().dataset("digit", "train").tensors
    module = Network()
    for batch in images.split(16):
        module.encoder(batch)  # stands in for pre-training
    monitor = BatchNormMonitor(every_n_steps=5, report=False)
    callbacks = [
        BatchNormFreezer(["encoder.0", "encoder.1"]),
        BatchNormFreezer(["encoder.3"], start_step=FREEZE, name="later"),
        monitor,
    ]
    loader = DataLoader(TensorDataset(images, labels), 32, shuffle=True, drop_last=True)
    trainer = Trainer(
        max_epochs=6,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return monitor


def heatmap(folder: Path = IMAGES) -> Figure:
    """The monitor's own figure, with a number at each thing that the page explains."""
    monitor = fitted(folder)
    figure = monitor.figure()
    circle = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": "black"}
    for number, (step, layer) in NUMBERS.items():
        place = (step, monitor.history.names.index(layer))
        figure.axes[0].annotate(str(number), place, ha="center", va="center", weight="bold", bbox=circle)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "what_moves": what_moves,
    "validation_curve": validation_curve,
    "monitor_heatmap": heatmap,
}

if __name__ == "__main__":
    fitting.be_quiet()
    with rc_context(STYLE):
        for name in sys.argv[1:] or FIGURES:
            FIGURES[name]().savefig(IMAGES / f"{name}.png", dpi=110)
            print(IMAGES / f"{name}.png")
