"""One recalibration of each network that was not frozen, and of the old one: what it does to old and new answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from rich.table import Table
from torch import Tensor

from data import pictures
from fine_tuning import HEADS, HIGH, LOW, TASKS, Accuracies, Outcome, Row, in_words
from lightning_bn.functional import Recalibration, recalibrate, restore_snapshot, take_snapshot
from network import PretrainedNetwork
from photographs import answers, crops, kept
from tables import results_table, spread

OLD, OLD_PRIOR = "before any fit", 1000
"""The network before any fit; and how many samples its own statistics are worth in one of the recalibrations."""
DIGITS, CROPS, CROPS_PRIOR = "digits", "crops", f"crops, prior {OLD_PRIOR}"
"""What it is recalibrated on."""
ROWS = (
    (OLD, CROPS),
    (OLD, CROPS_PRIOR),
    ((HEADS, False), DIGITS),
    ((HEADS, False), CROPS),
    ((LOW, False), DIGITS),
    ((HIGH, False), DIGITS),
)
"""Which network, and on what."""


@dataclass(frozen=True)
class Recalibrated:
    """A network after one recalibration.

    Attributes:
        given: Its answers on the photographs.
        accuracies: On the new tasks; empty for the old network, whose heads know nothing.
        said: What the recalibration says of itself.
    """

    given: Tensor
    accuracies: Accuracies
    said: Recalibration


def run(outcomes: dict[Row, Outcome]) -> list[Recalibrated]:
    """One recalibration per row; the networks are left as they were."""
    results = []
    for which, on in ROWS:
        if which == OLD:
            results.append(old_network(on))
            continue
        network = outcomes[which].network
        before = take_snapshot(network)
        said = recalibrated_on(network, on)
        results.append(Recalibrated(answers(network), accuracies(network), said))
        restore_snapshot(network, before)
    return results


@cache
def old_network(on: str) -> Recalibrated:
    """The same for every seed."""
    network = PretrainedNetwork().eval()
    said = recalibrated_on(network, on)
    return Recalibrated(answers(network), {}, said)


def recalibrated_on(network: PretrainedNetwork, on: str) -> Recalibration:
    """Statistics of 320 training pictures or of all crops, with the weights as they are."""
    batches = pictures("train").tensors[0][:320].split(64) if on == DIGITS else crops().split(14)
    # In training mode the blocks leave out paths at random, by a function that goes by the block's own mode.
    return recalibrate(
        network,
        batches,
        root="backbone",
        forward=lambda network, images: network.backbone(images),
        prior=OLD_PRIOR if on == CROPS_PRIOR else None,
        containers_in_eval=True,
    )


@torch.no_grad()
def accuracies(network: PretrainedNetwork) -> Accuracies:
    """On the new tasks' test pictures, in percent, with the statistics that the network holds."""
    network.eval()
    images, *labels = pictures("test").tensors
    parts = [network(part) for part in images.split(125)]
    given = {task: torch.cat([part[task] for part in parts]).argmax(dim=1) for task in TASKS}
    by_task = zip(TASKS, labels, strict=True)
    return {task: 100 * float((given[task] == expected).float().mean()) for task, expected in by_task}


def table(seeds: Sequence[list[Recalibrated]]) -> Table:
    """One line per row."""
    result = results_table(
        "2. The same networks after one recalibration",
        ["network", "recalibrated on"],
        ["old answers\ngiven, %", "new:\ndigit, %", "new:\nparity, %"],
    )
    for index, (which, on) in enumerate(ROWS):
        of_row = [results[index] for results in seeds]
        of_tasks = ["–"] * len(TASKS)
        if which != OLD:
            of_tasks = [spread([one.accuracies[task] for one in of_row]) for task in TASKS]
        name = OLD if which == OLD else in_words(which)[0]
        result.add_row(name, on, spread([kept(one.given) for one in of_row]), *of_tasks)
    return result


def reading(seeds: Sequence[list[Recalibrated]]) -> str:
    """What the table says, from its own numbers."""
    old, heads = ROWS.index((OLD, CROPS)), ROWS.index(((HEADS, False), CROPS))
    same = sum(torch.equal(results[old].given, results[heads].given) for results in seeds)
    error = seeds[0][old].said.standard_error
    return (
        "A recalibration is no way back: its result depends on the weights and on what it is fed. Recalibrated on the "
        f"crops, the old network and the one with trained heads give the same {len(crops())} answers in {same} of "
        f"{len(seeds)} fits. And two photographs are not ImageNet: the standard error that it reports is {error:.2f}."
    )
