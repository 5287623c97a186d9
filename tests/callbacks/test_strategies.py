"""Which strategies the callbacks work under, and that the others are refused before anything begins."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm, TaskBatchNorm
from tests.callbacks.fits import Classifier, quiet, train_loader, val_loader
from tests.models import bits, fill_statistics
from tests.ranks import ROOT

CALLBACKS = [lambda: BatchNormFreezer(["net"]), BatchNormMonitor, PreciseBatchNorm, lambda: TaskBatchNorm(["one"])]


class DeepSpeedStrategy(pl.strategies.DDPStrategy):
    """Of the name of Lightning's, which cannot be constructed without the deepspeed package."""


class XLAFSDPStrategy(pl.strategies.DDPStrategy):
    """Of the name of one that takes TPUs."""


SHARDED = [
    XLAFSDPStrategy,
    pl.strategies.FSDPStrategy,
    pl.strategies.ModelParallelStrategy,
    DeepSpeedStrategy,
    lightning.pytorch.strategies.FSDPStrategy,
]


@pytest.mark.parametrize("build", CALLBACKS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_sharded_strategies_are_refused_with_the_reason_when_a_run_is_set_up(build: Any, strategy: Any) -> None:
    trainer, callback = quiet(), build()
    # A Trainer that is given one without a GPU fails by itself.
    trainer._accelerator_connector.strategy = strategy()
    with pytest.raises(
        MisconfigurationException, match=f"does not support {strategy.__name__}, where each rank holds only parts"
    ):
        callback.setup(trainer, Classifier(), "fit")


@pytest.mark.parametrize("build", CALLBACKS)
def test_whole_models_are_not_refused(build: Any) -> None:
    for strategy in (pl.strategies.DDPStrategy(), pl.strategies.SingleDeviceStrategy()):
        trainer, callback = quiet(), build()
        trainer.callbacks = [callback]
        trainer._accelerator_connector.strategy = strategy
        callback.setup(trainer, Classifier(), "fit")


class Grouped(pl.strategies.SingleDeviceStrategy):
    """Several processes that do not communicate through torch.distributed, as on other hardware."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.world_size = 2


@pytest.mark.parametrize("build", CALLBACKS)
def test_several_processes_without_a_process_group_are_refused_when_a_run_is_set_up(build: Any) -> None:
    trainer = quiet(callbacks=[build()], strategy=Grouped())
    with pytest.raises(MisconfigurationException, match=r"does not support Grouped with 2 processes: .*process group"):
        trainer.fit(fill_statistics(Classifier()), train_loader(), val_loader())


def test_spawned_processes_bring_back_what_was_frozen_and_what_was_recalibrated(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks.spawned_fit", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    [frozen] = [name for name in found["before"] if name.endswith("features.1.running_var")]
    assert bits(found["after"][frozen]) == bits(found["before"][frozen])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name: bits(value) for name, value in found["after"].items()} == {
        name: bits(value) for name, value in saved.items()
    }
    # What both processes wrote at the last validation, which says that both took part.
    by_rank = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert by_rank[0]["processes"] == by_rank[1]["processes"] == 2
    assert by_rank[0]["bits"] == by_rank[1]["bits"]
    assert by_rank[0]["identical"]
