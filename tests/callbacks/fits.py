"""Small fits, shared by the tests of the callbacks: data, modules, quiet Trainers, and what a run left behind."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.models import bits, images, seeded


class Net(nn.Module):
    """Three BatchNorm layers and dropout; input (N, 3, H, W), output (N, 2)."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(4, 4, 1)
        )
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.features(x))).mean((2, 3)))


LAYERS = ("net.features.1", "net.bn", "net.head.1")

#: What `training_step` was given without gradients, so by a recalibration, since the list was last cleared. Outside of
#: any module: what modules keep is restored.
RECALIBRATED_FROM: list[Any] = []


class Classifier(pl.LightningModule):
    """Trains `Net`; keeps a copy of it, and of the batches it was recalibrated from, at each validation run."""

    def __init__(self, lr: float = 0.1, dropout: float = 0.3) -> None:
        super().__init__()
        self.lr = lr
        self.net = seeded(lambda: Net(dropout))
        RECALIBRATED_FROM.clear()
        self.validated: list[tuple[int, nn.Module, list[Any]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[0], batch[1]
        if not torch.is_grad_enabled():
            RECALIBRATED_FROM.append(x.clone())
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append((self.trainer.global_step, copy.deepcopy(self.net), list(RECALIBRATED_FROM)))
            RECALIBRATED_FROM.clear()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.01)


def samples(count: int = 28, seed: int = 0) -> TensorDataset:
    """Images, labels and the index of each sample."""
    labels = torch.arange(count) % 2
    return TensorDataset(images(count, seed=seed, size=4) + labels[:, None, None, None], labels, torch.arange(count))


def train_loader(dataset: Dataset[Any] | None = None, **kwargs: Any) -> DataLoader[Any]:
    """Batches of 8, shuffled unless asked otherwise; the last one has 4 samples."""
    return DataLoader(dataset or samples(), **{"batch_size": 8, "shuffle": True, **kwargs})


def val_loader() -> DataLoader[Any]:
    return DataLoader(samples(8, seed=9), batch_size=4)


def quiet(**kwargs: Any) -> pl.Trainer:
    """A Trainer on the CPU that shows and writes nothing."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**settings, **kwargs})


class Recorder(pl.Callback):
    """Which samples each training batch had, and its loss."""

    def __init__(self) -> None:
        self.trace: list[Any] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.trace.append((leaf_values(batch), bits(outputs["loss"])))


def leaf_values(batch: Any) -> Any:
    """The batch with its tensors replaced by something short that tells them apart."""
    if isinstance(batch, Tensor):
        return hashlib.sha1(bits(batch)).hexdigest()[:8]
    if isinstance(batch, dict):
        return {key: leaf_values(value) for key, value in batch.items()}
    return [leaf_values(value) for value in batch] if isinstance(batch, list | tuple) else batch


def trajectory(
    build: Callable[[], pl.LightningModule], data: Callable[[], dict[str, Any]], *callbacks: pl.Callback, **trainer: Any
) -> tuple[list[Any], list[bytes], pl.LightningModule]:
    """Batches and losses of a seeded fit, its final parameters, and the module."""
    pl.seed_everything(7, verbose=False)
    recorder = Recorder()
    module = build()
    quiet(callbacks=[*callbacks, recorder], **trainer).fit(module, **data())
    assert recorder.trace
    return recorder.trace, [bits(parameter) for parameter in module.parameters()], module
