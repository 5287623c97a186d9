"""Fine-tuning: the heads alone or the whole network, its BatchNorm layers free or frozen. Each fit is config.yaml's.

The fits differ in the learning rate of the backbone's weights and in whether the file's BatchNormFreezer is left in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from pytorch_lightning import Trainer
from rich.table import Table
from torch import nn

import cli
from lightning_bn import BatchNormMonitor
from lightning_bn.functional import take_snapshot
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.statistics import Snapshot
from model import TwoTasks
from network import PretrainedNetwork
from photographs import answers, kept, old_answers
from tables import results_table, spread

HERE = Path(__file__).parent
HEADS, LOW, HIGH = None, 0.0001, 0.01
"""Learning rates of the backbone; with None only the heads are trained."""
ROWS = [(backbone_lr, frozen) for backbone_lr in (HEADS, LOW, HIGH) for frozen in (False, True)]
"""Learning rate of the backbone, and whether BatchNorm is frozen."""
TASKS = ("digit", "parity")

Row = tuple[float | None, bool]
Accuracies = dict[str, float]
"""By task, in percent."""


@dataclass(frozen=True)
class Outcome:
    """One fit.

    Attributes:
        network: After it.
        old_kept: How many of the old network's answers on the photographs are still given, in percent.
        accuracies: On the new tasks.
        weights_kept: Whether every weight of the backbone is bit-identical.
        before: The backbone's running statistics before the fit.
        after: After it.
        history: How far each layer's were during the fit, as BatchNormMonitor saw it.
    """

    network: PretrainedNetwork
    old_kept: float
    accuracies: Accuracies
    weights_kept: bool
    before: Snapshot
    after: Snapshot
    history: DriftHistory


def run(
    seed: int, folder: Path, announce: Callable[[str], None], rows: Sequence[Row] = ROWS, **settings: Any
) -> dict[Row, Outcome]:
    """One fit per row, with ``settings`` of the Trainer beside the file's."""
    outcomes = {}
    old = PretrainedNetwork()
    before = take_snapshot(old, root="backbone")
    for row in rows:
        announce(", ".join(in_words(row)))
        trainer, network = fit_yaml(seed, folder, *row, **settings)
        outcomes[row] = Outcome(
            network=network,
            old_kept=kept(answers(network)),
            accuracies={task: float(trainer.callback_metrics[f"{task}_accuracy"]) for task in TASKS},
            weights_kept=same_weights(old.backbone, network.backbone),
            before=before,
            after=take_snapshot(network, root="backbone"),
            history=next(one.history for one in trainer.callbacks if isinstance(one, BatchNormMonitor)),
        )
    return outcomes


def fit_yaml(
    seed: int, folder: Path, backbone_lr: float | None, frozen: bool, **settings: Any
) -> tuple[Trainer, PretrainedNetwork]:
    """What ``python cli.py fit --config config.yaml`` does, quietly.

    Args:
        seed: In place of the file's.
        folder: Where logs go, in place of the file's.
        backbone_lr: In place of the file's.
        frozen: Whether BatchNormFreezer stays.
        settings: Of the Trainer, beside the file's.

    Returns:
        The Trainer and the network after the fit.
    """
    config = yaml.safe_load((HERE / "config.yaml").read_text(encoding="utf-8"))
    config["seed_everything"] = seed
    config["model"]["backbone_lr"] = backbone_lr
    trainer = config["trainer"]
    trainer.update(enable_progress_bar=False, enable_model_summary=False, **settings)
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    if not frozen:
        trainer["callbacks"] = [one for one in trainer["callbacks"] if "BatchNormFreezer" not in one["class_path"]]
    fitted = cli.main({"subcommand": "fit", "fit": config})
    assert isinstance(fitted.model, TwoTasks)
    return fitted.trainer, fitted.model.network


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether all parameters are equal, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def in_words(row: Row) -> tuple[str, str]:
    """What trains, and what BatchNorm does."""
    backbone_lr, frozen = row
    trains = "the heads only" if backbone_lr is None else f"backbone too, lr {backbone_lr:g}"
    return trains, "frozen" if frozen else "free"


def table(seeds: Sequence[dict[Row, Outcome]]) -> Table:
    """One line per row: ImageNet's answers and the new tasks."""
    result = results_table(
        "1. New heads on a network that knew ImageNet",
        ["what trains", "BatchNorm"],
        ["old answers\nstill given, %", "new:\ndigit, %", "new:\nparity, %"],
    )
    for row in ROWS:
        outcomes = [of_seed[row] for of_seed in seeds]
        of_tasks = (spread([outcome.accuracies[task] for outcome in outcomes]) for task in TASKS)
        result.add_row(*in_words(row), spread([outcome.old_kept for outcome in outcomes]), *of_tasks)
    return result


def reading(seeds: Sequence[dict[Row, Outcome]]) -> str:
    """What the table says, from its own numbers."""
    free, frozen = ([of_seed[HEADS, which] for of_seed in seeds] for which in (False, True))
    weights = sum(outcome.weights_kept for outcome in free + frozen)
    statistics = sum(outcome.before.same_bits(outcome.after) for outcome in frozen)
    lost, kept_with = (fmean(outcome.old_kept for outcome in outcomes) for outcomes in (free, frozen))
    return (
        f"The old network sees {len(old_answers().unique())} of ImageNet's classes in the {len(old_answers())} crops. "
        f"Where only the heads trained, the backbone's weights are bit-identical in {weights} of "
        f"{len(free + frozen)} fits. With free BatchNorm {lost:.0f} % of the old answers are still given; with frozen "
        f"{kept_with:.0f} %, its statistics bit-identical in {statistics} of {len(frozen)} fits."
    )
