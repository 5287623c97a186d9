"""Experiment 3: two tasks alternate through one backbone, and share one set of running statistics.

In training every batch is normalized with statistics of its own task. The moving average is of both, and describes
neither. The weights are the same in all rows; only the statistics that evaluation uses differ.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
from pytorch_lightning import seed_everything
from rich.table import Table

from data import DigitsData, Task
from fitting import fit
from lightning_bn.functional import recalibrate, restore_snapshot, take_snapshot
from model import DigitsModule
from network import MultiTaskNetwork
from tables import results_table, spread

TASKS: tuple[Task, ...] = ("digit", "parity")
EPOCHS = 8
FITS = 1
"""Fits per seed."""

SHARED, POOLED, OWN = "shared average", "one pooled recalibration", "recalibrated on each task's own data"

Accuracies = dict[str, dict[Task, float]]
"""By statistics, then by task, in percent."""


def run(seed: int, announce: Callable[[str], None]) -> Accuracies:
    """Trains on both tasks, then evaluates the same weights with three kinds of statistics."""
    announce("both tasks, in turn")
    seed_everything(seed, verbose=False)
    module, data = DigitsModule(), DigitsData(train_on=TASKS, validate_on=TASKS)
    fit(module, data, EPOCHS)

    network = module.network.eval()
    shared = take_snapshot(network)
    results = {SHARED: {task: accuracy(network, data, task) for task in TASKS}}

    recalibrate(network, batches(data, TASKS))
    results[POOLED] = {task: accuracy(network, data, task) for task in TASKS}

    results[OWN] = {}
    for task in TASKS:
        restore_snapshot(network, shared)
        recalibrate(network, batches(data, [task]))
        results[OWN][task] = accuracy(network, data, task)
    return results


def batches(data: DigitsData, tasks: Iterable[Task]) -> list[dict[str, Any]]:
    """One pass over the training images of each task, as the keywords of the network's forward."""
    return [{"images": images, "task": task} for task in tasks for images, _ in data.train_loader(task)]


@torch.no_grad()
def accuracy(network: MultiTaskNetwork, data: DigitsData, task: Task) -> float:
    """Of one task on its test set, in percent, with the running statistics that the network holds."""
    images, labels = data.dataset(task, "test").tensors
    correct = network(images, task).argmax(dim=1) == labels
    return 100 * float(correct.float().mean())


def table(seeds: Sequence[Accuracies]) -> Table:
    """One line per kind of statistics."""
    result = results_table(
        "3. Two tasks alternating through one backbone: the same weights",
        ["running statistics"],
        ["ten digits, %", "parity, %"],
    )
    for statistics in (SHARED, POOLED, OWN):
        result.add_row(statistics, *(spread([seed[statistics][task] for seed in seeds]) for task in TASKS))
    return result


def reading(seeds: Sequence[Accuracies]) -> str:
    """What the table says, from its own numbers."""

    def gain(statistics: str) -> str:
        """Points above the shared average, mean over the seeds, for each task."""
        gains = [fmean(seed[statistics][task] - seed[SHARED][task] for seed in seeds) for task in TASKS]
        return " and ".join(f"{value:+.1f}" for value in gains)

    return (
        f"Against the shared average, one pooled recalibration changes the two tasks by {gain(POOLED)} points, and "
        f"statistics of each task's own data by {gain(OWN)}: no weight differs between the rows."
    )
