"""What a user has beside a YAML file: a LightningModule, a LightningDataModule, and a LightningCLI of one's own."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import RecalibrateCommand


class FromYaml(pl.LightningModule):
    """Two BatchNorm layers; its step logs, counts and draws random numbers."""

    def __init__(self, lr: float = 0.01, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.steps = lr, 0
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        loss = (self.net(batch[0]) - torch.rand(1)).square().mean()
        self.log("loss", loss)
        return loss

    def fails(self, batch: list[Tensor]) -> float:
        return 1 / 0

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("validated", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class DataFromYaml(pl.LightningDataModule):
    """Inputs of mean 1 and standard deviation 3."""

    def __init__(self, count: int = 96) -> None:
        super().__init__()
        self.count = count

    def inputs(self) -> Tensor:
        return 3 * torch.randn(self.count, 4, generator=torch.Generator().manual_seed(0)) + 1

    def setup(self, stage: str) -> None:
        self.data = TensorDataset(self.inputs())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=16, num_workers=1)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=16)


class OwnCLI(RecalibrateCommand, LightningCLI):
    """A user's own."""
