"""Scikit-learn's handwritten digits as color pictures of 64 x 64 pixels, each with two labels.

The split is the same in every run: seeds vary the heads' initial weights and the order of the batches, nothing else.
"""

from functools import cache
from typing import Literal

import torch
from pytorch_lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

from network import as_seen_in_training

Part = Literal["train", "test"]

NUM_TEST = 500
"""Pictures held out of training, the same for all seeds."""
SIZE = 64
"""Height and width of a picture."""


@cache
def pictures(part: Part) -> TensorDataset:
    """Pictures ``(N, 3, 64, 64)``, which digit each shows ``(N,)``, and whether that digit is odd ``(N,)``."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) * 255 / 16
    large = as_seen_in_training(interpolate(pixels, size=(SIZE, SIZE), mode="bilinear")).repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = shuffled[:NUM_TEST] if part == "test" else shuffled[NUM_TEST:]
    return TensorDataset(large[chosen], labels[chosen], labels[chosen] % 2)


class DigitPictures(LightningDataModule):
    """Batches ``(pictures, digits, parities)``.

    Args:
        batch_size: Pictures in a training batch.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(pictures("train"), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(pictures("test"), batch_size=125)
