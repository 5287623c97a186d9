"""A loader that knows its own position, as torchdata's does, is where it was after a recalibration."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_bn import PreciseBatchNorm
from tests.callbacks.fits import Classifier, Recorder, quiet, samples, trajectory, val_loader
from tests.models import bits

# torchdata's own use of what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


def loader(workers: int = 0, count: int = 44, **kwargs: Any) -> StatefulDataLoader:
    return StatefulDataLoader(samples(count), batch_size=8, shuffle=True, num_workers=workers, **kwargs)


def loaders(**kwargs: Any) -> dict[str, Any]:
    return {"train_dataloaders": loader(**kwargs), "val_dataloaders": val_loader()}


SETTINGS = {"val_check_interval": 2, "num_sanity_val_steps": 0}
KINDS: dict[str, dict[str, Any]] = {
    "main process": {},
    "generator": {"generator": 5},
    "worker": {"workers": 1},
    "persistent worker": {"workers": 1, "persistent_workers": True},
}


def made(kind: str) -> dict[str, Any]:
    kwargs = dict(KINDS[kind])
    if "generator" in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(kwargs["generator"])
    return loaders(**kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bit_identical_to_a_run_without_it(kind: str) -> None:
    callback = PreciseBatchNorm(num_batches=3)
    runs = [trajectory(Classifier, lambda: made(kind), *used, **SETTINGS) for used in ([], [callback])]
    assert callback.last is not None
    assert len(runs[0][0]) == 12
    assert runs[0][:2] == runs[1][:2]


class Keeping(pl.Callback):
    """The loader's own account of its position at the end of each training batch and of each validation."""

    def __init__(self) -> None:
        self.positions: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.positions.append(comparable(trainer.train_dataloader.state_dict()))

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.positions.append(comparable(trainer.train_dataloader.state_dict()))


def comparable(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return bits(state)
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items()}
    return [comparable(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize("kind", ["main process", "worker"])
def test_position_is_the_same_with_and_without_it(kind: str) -> None:
    positions = []
    for used in ([], [PreciseBatchNorm(num_batches=3)]):
        keeping = Keeping()
        trajectory(Classifier, lambda: made(kind), *used, keeping, **SETTINGS)
        positions.append(keeping.positions)
    assert len({str(position) for position in positions[0]}) > 6
    assert positions[0] == positions[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_run_resumed_in_the_middle_of_an_epoch_takes_the_batches_that_were_left(tmp_path: Path, workers: int) -> None:
    def fit(ckpt_path: Path | None = None) -> Recorder:
        pl.seed_everything(3, verbose=False)
        recorder = Recorder()
        # Saved right after the validation in the middle, so right after a recalibration.
        saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}", monitor=None)
        quiet(
            callbacks=[recorder, PreciseBatchNorm(num_batches=3), saver],
            enable_checkpointing=True,
            max_epochs=1,
            val_check_interval=2,
            num_sanity_val_steps=0,
        ).fit(Classifier(), **loaders(workers=workers), ckpt_path=ckpt_path)
        return recorder

    whole = fit()
    resumed = fit(tmp_path / "step=2.ckpt")
    assert len(whole.trace) == 6
    seen = [[seen for seen, _ in recorder.trace] for recorder in (whole, resumed)]
    assert seen[1] == seen[0][2:]
