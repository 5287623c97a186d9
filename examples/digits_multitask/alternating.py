"""Experiment 3: two tasks alternate through one backbone, with one set of running statistics or one for each.

In training every batch is normalized with statistics of its own task. A moving average of both describes neither. The
weights are the same in all rows; only the statistics that evaluation uses differ.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from pytorch_lightning import Callback, seed_everything
from rich.table import Table

from data import DigitsData, Task
from fitting import Curve, fit
from forgetting import same_weights
from lightning_bn import TaskBatchNorm
from lightning_bn.functional import recalibrate, restore_snapshot, take_snapshot
from model import DigitsModule
from network import MultiTaskNetwork
from tables import results_table, spread

TASKS: tuple[Task, ...] = ("digit", "parity")
EPOCHS = 8

SHARED, POOLED, RECALIBRATED = "shared average", "one pooled recalibration", "recalibrated on each task's own data"
OWN, SUGGESTED = "moving average per task", "for suggest()'s layers only"
ROWS = (SHARED, POOLED, RECALIBRATED, OWN, SUGGESTED)

FITS = 3
"""Fits per seed."""

Accuracies = dict[Task, float]
"""By task, in percent."""


@dataclass(frozen=True)
class Alternated:
    """The same training with several kinds of statistics.

    Attributes:
        accuracies: By kind of statistics.
        suggested: The layers that need statistics for each task, as ``task_drift(bank).suggest()`` names them.
        same_training: Of each further fit, whether it ended with bit-identical weights.
    """

    accuracies: dict[str, Accuracies]
    suggested: tuple[str, ...]
    same_training: tuple[bool, ...]


def run(seed: int, announce: Callable[[str], None]) -> Alternated:
    """Trains on both tasks three times: with shared statistics, with those of each task, with those where needed."""
    announce("both tasks, in turn")
    module, data, curve = train(seed)
    results = {SHARED: last(curve)}

    network = module.network.eval()
    shared = take_snapshot(network)
    recalibrate(network, batches(data, TASKS))
    results[POOLED] = {task: accuracy(network, data, task) for task in TASKS}

    results[RECALIBRATED] = {}
    for task in TASKS:
        restore_snapshot(network, shared)
        recalibrate(network, batches(data, [task]))
        results[RECALIBRATED][task] = accuracy(network, data, task)

    announce("both tasks, own statistics for each")
    own = TaskBatchNorm(tasks=[*TASKS], root="network", modules=["backbone"])
    module_of_own, _, curve = train(seed, own)
    results[OWN] = last(curve)

    suggested = own.drift().suggest()
    announce("both tasks, own statistics where needed")
    module_of_suggested, _, curve = train(seed, TaskBatchNorm(tasks=[*TASKS], modules=suggested))
    results[SUGGESTED] = last(curve)

    same = (same_weights(module, other) for other in (module_of_own, module_of_suggested))
    return Alternated(results, tuple(suggested), tuple(same))


def train(seed: int, *callbacks: Callback) -> tuple[DigitsModule, DigitsData, Curve]:
    """One training on both tasks, each with its part in every step."""
    seed_everything(seed, verbose=False)
    module, data = DigitsModule(), DigitsData(train_on=TASKS, validate_on=TASKS)
    return module, data, fit(module, data, EPOCHS, callbacks)


def last(curve: Curve) -> Accuracies:
    """Of the last validation, with the running statistics as training left them."""
    return {task: curve[f"{task}_accuracy"][-1] for task in TASKS}


def batches(data: DigitsData, tasks: Iterable[Task]) -> list[dict[str, Any]]:
    """One pass over the training images of each task, as the keywords of the network's forward."""
    return [{"images": images, "task": task} for task in tasks for images, _ in data.train_loader(task)]


@torch.no_grad()
def accuracy(network: MultiTaskNetwork, data: DigitsData, task: Task) -> float:
    """Of one task on its test set, in percent, with the running statistics that the network holds."""
    images, labels = data.dataset(task, "test").tensors
    correct = network(images, task).argmax(dim=1) == labels
    return 100 * float(correct.float().mean())


def table(seeds: Sequence[Alternated]) -> Table:
    """One line per kind of statistics."""
    result = results_table(
        "3. Two tasks alternating through one backbone: the same weights",
        ["running statistics"],
        ["ten digits, %", "parity, %"],
    )
    for row in ROWS:
        result.add_row(row, *(spread([seed.accuracies[row][task] for seed in seeds]) for task in TASKS))
    return result


def reading(seeds: Sequence[Alternated]) -> str:
    """What the table says, from its own numbers."""

    def gain(row: str) -> str:
        """Points above the shared average, mean over the seeds, for each task."""
        gains = [fmean(seed.accuracies[row][task] - seed.accuracies[SHARED][task] for seed in seeds) for task in TASKS]
        return " and ".join(f"{round(value, 1) + 0.0:+.1f}" for value in gains)

    def above(seed: Alternated) -> bool:
        """Whether a moving average per task is better than the shared one, on both tasks."""
        return all(seed.accuracies[OWN][task] > seed.accuracies[SHARED][task] for task in TASKS)

    apart = max(abs(seed.accuracies[SUGGESTED][task] - seed.accuracies[OWN][task]) for seed in seeds for task in TASKS)
    same = [kept for seed in seeds for kept in seed.same_training]
    named = Counter(", ".join(seed.suggested) or "nothing" for seed in seeds)
    suggestions = "; ".join(f"{layers} in {count} of {len(seeds)} fits" for layers, count in named.items())
    return (
        f"Against the shared average, one pooled recalibration changes the two tasks by {gain(POOLED)} points, "
        f"statistics of each task's own data by {gain(RECALIBRATED)}, and a moving average for each task by "
        f"{gain(OWN)} (up on both in {sum(map(above, seeds))} of {len(seeds)} fits). No weight differs between the "
        f"rows: training was bit-identical in {sum(same)} of {len(same)} further fits. suggest() names {suggestions}; "
        f"with own statistics there alone no accuracy is more than {apart:.1f} points from that with all layers'."
    )
