"""Two tasks through one backbone: their images one after the other, or together in one forward.

Network, data and settings are those of experiment 3. In turn, each half of a step is normalized with the statistics of
its own task, and the moving average describes neither. Together, training normalizes with those of the mixture, and the
moving average is of the same mixture.
"""

import argparse
from statistics import fmean

import torch
from pytorch_lightning import seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy

from alternating import EPOCHS, TASKS, last
from data import DigitsData
from fitting import be_quiet, fit
from model import Batch, DigitsModule


class Mixed(DigitsModule):
    """All tasks of a step in one forward of the backbone, then each through its head."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features = self.network.backbone(torch.cat([images for images, _ in batch.values()]))
        parts = features.split([len(images) for images, _ in batch.values()])
        losses = [
            cross_entropy(self.network.heads[task](part), labels)
            for part, (task, (_, labels)) in zip(parts, batch.items(), strict=True)
        ]
        return torch.stack(losses).sum()


def main() -> None:
    """Print a line per way to train, with the mean over the seeds and the least and the largest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds to run (default: 5)")
    seeds = range(parser.parse_args().seeds)
    be_quiet()
    torch.set_num_threads(1)
    print(f"{'images of the two tasks':<26}{'ten digits, %':>24}{'parity, %':>24}")
    for name, kind in (("in turn", DigitsModule), ("together in one forward", Mixed)):
        found = []
        for seed in seeds:
            seed_everything(seed, verbose=False)
            found.append(last(fit(kind(), DigitsData(train_on=TASKS, validate_on=TASKS), EPOCHS)))
        columns = [[one[task] for one in found] for task in TASKS]
        cells = [f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in columns]
        print(f"{name:<26}{cells[0]:>24}{cells[1]:>24}")


if __name__ == "__main__":
    main()
