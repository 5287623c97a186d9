"""A fit with all callbacks under `ddp_spawn`; what came back to the process that started it."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm
from tests.callbacks.fits import Classifier, quiet, samples, train_loader, val_loader
from tests.models import fill_statistics, state_bits


class Noting(pl.Callback):
    """What each process had at the end; attributes of callbacks do not come back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.bits = state_bits(pl_module.net)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        freezer, precise = trainer.callbacks[0], next(c for c in trainer.callbacks if isinstance(c, PreciseBatchNorm))
        found = {"bits": self.bits, "processes": precise.last.processes, "identical": freezer.report.identical}
        torch.save(found, self.folder / f"rank{trainer.global_rank}.pt")


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(5, verbose=False)
    module = Classifier()
    fill_statistics(module.net)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = quiet(
        callbacks=[
            BatchNormFreezer(["features"], root="net"),
            BatchNormMonitor(every_n_steps=1, report=False),
            PreciseBatchNorm(2),
            Noting(folder),
            ModelCheckpoint(folder, save_last=True),
        ],
        enable_checkpointing=True,
        strategy="ddp_spawn",
        devices=2,
        max_epochs=2,
    )
    trainer.fit(module, train_loader(samples(32)), val_loader())
    after = dict(module.state_dict())
    torch.save({"before": before, "after": after}, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
