"""Small fits for the tests of the monitor: pre-trained networks, planted faults, and what was said of them."""

import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import BatchNormMonitor
from tests.callbacks.fits import Net, quiet, samples, train_loader, val_loader
from tests.models import seeded
from tests.versions import reading

#: What a planted fault does to the images of a batch, given the optimizer step.
Fault = Callable[[Tensor, int], Tensor]


class TamperedClassifier(pl.LightningModule):
    """A classifier whose training images may be tampered with on the way in."""

    def __init__(self, net: nn.Module, fault: Fault | None = None, lr: float = 0.01) -> None:
        super().__init__()
        self.net, self.fault, self.lr = net, fault, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] if self.fault is None else self.fault(batch[0], self.trainer.global_step)
        return F.cross_entropy(self.net(x), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def norms(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def pretrained(net: nn.Module | None = None, updates: int = 60) -> nn.Module:
    """The network with the statistics of the data that it is then trained on."""
    net = seeded(lambda: Net(dropout=0.0)) if net is None else net
    net.train()
    with torch.no_grad():
        for seed in range(updates):
            net(samples(32, seed=50 + seed).tensors[0])
    return net


def monitor(**arguments: Any) -> BatchNormMonitor:
    return BatchNormMonitor(**{"every_n_steps": 1, "report": False, **arguments})


def warned(run: Callable[[], object]) -> list[str]:
    """What monitors warned of, one line each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if str(one.message).startswith("BatchNormMonitor")]


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    count: int = 256,
    batch_size: int = 8,
    validate: bool = True,
    ckpt_path: Any = None,
    **trainer: Any,
) -> list[str]:
    """Trains on ``count // batch_size`` batches an epoch; what monitors warned of."""
    loader = train_loader(samples(count), batch_size=batch_size, drop_last=True)
    loaders = (loader, val_loader()) if validate else (loader,)

    def run() -> None:
        pl.seed_everything(3, verbose=False)
        quiet(callbacks=list(callbacks), **trainer).fit(module, *loaders, **reading(ckpt_path))

    return warned(run)


def csv_rows(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("bn/jeffreys_max")]


# --- arguments -----------------------------------------------------------------------------------------------------
