"""Two tasks over scikit-learn's handwritten digits, each seen through a sensor of its own.

Nothing is downloaded: the 1,797 images of 8 x 8 pixels come with scikit-learn. The split is the same in every run:
seeds vary the initial weights and the order of the batches, nothing else.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import CombinedLoader
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Task = Literal["digit", "parity"]
Part = Literal["train", "test"]

NUM_TEST = 500
"""Images held out of training, the same for both tasks and all seeds."""


@cache
def _digits(part: Part) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 8, 8)`` with pixels in [0, 1], and the digits ``(N,)``."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = shuffled[:NUM_TEST] if part == "test" else shuffled[NUM_TEST:]
    return images[chosen], labels[chosen]


class DigitsData(LightningDataModule):
    """Batches ``{task: (images, labels)}`` for one or several tasks at once, in training and in validation.

    Task ``"digit"`` is which of the ten digits an image shows, with pixels in [0, 1]. Task ``"parity"`` is whether that
    digit is odd, from a sensor that reports ``gain * pixel + offset``.

    Args:
        train_on: The tasks in every training batch.
        validate_on: The tasks whose test sets are evaluated.
        batch_size: Images per task in a training batch.
        gain: Of the parity task's sensor.
        offset: Of the parity task's sensor.
    """

    def __init__(
        self,
        train_on: Sequence[Task] = ("digit",),
        validate_on: Sequence[Task] = ("digit",),
        batch_size: int = 64,
        gain: float = 2.5,
        offset: float = 0.5,
    ) -> None:
        super().__init__()
        self.train_on = tuple(train_on)
        self.validate_on = tuple(validate_on)
        self.batch_size = batch_size
        self.gain = gain
        self.offset = offset

    def dataset(self, task: Task, part: Part) -> TensorDataset:
        """Images ``(N, 1, 8, 8)`` as the task's sensor reports them, and the task's labels ``(N,)``."""
        images, labels = _digits(part)
        if task == "parity":
            images, labels = self.gain * images + self.offset, labels % 2
        return TensorDataset(images, labels)

    def train_loader(self, task: Task) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches of one task, without the incomplete last one."""
        return DataLoader(self.dataset(task, "train"), self.batch_size, shuffle=True, drop_last=True)

    def train_dataloader(self) -> CombinedLoader:
        return CombinedLoader({task: self.train_loader(task) for task in self.train_on}, "min_size")

    def val_dataloader(self) -> CombinedLoader:
        return CombinedLoader({task: DataLoader(self.dataset(task, "test"), NUM_TEST) for task in self.validate_on})
