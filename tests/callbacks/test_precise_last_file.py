"""Whatever ends a fit, the file saved last holds what evaluation will use, or one line says that it does not."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lightning_bn import PreciseBatchNorm
from tests.averages import EMAWeightAveraging
from tests.callbacks.fits import LAYERS, RECALIBRATED_FROM, Classifier, quiet, train_loader, val_loader
from tests.models import Broken, bits, state_bits
from tests.oracle import assert_all_statistics, layer_inputs
from tests.versions import skip_without

NORMS = [name.removeprefix("net.") for name in LAYERS]
EACH_EPOCH = {"save_top_k": -1, "save_on_train_epoch_end": True}


class Logging(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss


class Stops(pl.Callback):
    """Asks for an end in the middle of an epoch, as a timer or a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def stopped_early() -> EarlyStopping:
    return EarlyStopping("train_loss", patience=1, min_delta=1e6, check_on_train_epoch_end=True)


#: Arguments of the Trainer, of ModelCheckpoint, and the other callbacks.
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[], list[pl.Callback]]]] = {
    "early stopping without validation": (
        {"limit_val_batches": 0, "max_epochs": 9},
        EACH_EPOCH,
        lambda: [stopped_early()],
    ),
    "max_steps in mid-epoch": ({"max_epochs": -1, "max_steps": 6}, EACH_EPOCH, list),
    "max_steps without validation": ({"max_epochs": -1, "max_steps": 6, "limit_val_batches": 0}, EACH_EPOCH, list),
    "no validation is left": ({"check_val_every_n_epoch": 2, "max_epochs": 3}, EACH_EPOCH, list),
    "every n-th validation": ({"max_epochs": 3}, EACH_EPOCH, list),
    "a file after every step": ({}, {"save_top_k": -1, "every_n_train_steps": 1}, list),
    "stopped in mid-epoch": ({"max_epochs": 9}, EACH_EPOCH, lambda: [Stops(6)]),
    "stopped in mid-epoch without validation": (
        {"max_epochs": 9, "limit_val_batches": 0},
        EACH_EPOCH,
        lambda: [Stops(6)],
    ),
    "weights alone": ({"limit_val_batches": 0}, {**EACH_EPOCH, "save_weights_only": True}, list),
    "as last.ckpt": ({"limit_val_batches": 0}, {"save_last": True, "save_top_k": 0, "every_n_epochs": 3}, list),
}


def run(
    folder: Path, trainer: dict[str, Any], saver: dict[str, Any], others: list[pl.Callback], **arguments: Any
) -> tuple[Logging, PreciseBatchNorm, list[Path]]:
    """A fit; the module, the callback, and the files in the order in which they were saved."""
    saved: list[Path] = []

    class Recording(pl.Trainer):
        def save_checkpoint(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
            super().save_checkpoint(filepath, *args, **kwargs)
            saved.append(Path(filepath))

    pl.seed_everything(3, verbose=False)
    module, callback = Logging(), PreciseBatchNorm(num_batches=3, **arguments)
    checkpoint = ModelCheckpoint(dirpath=folder, filename="{step}", **saver)
    settings = {"max_epochs": 2, **trainer, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    quiet_settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    fit = Recording(callbacks=[*others, callback, checkpoint], enable_model_summary=False, **settings, **quiet_settings)
    fit.fit(module, train_loader(), val_loader())
    assert "save_checkpoint" not in vars(fit)
    pickle.dumps(callback)
    return module, callback, saved


@pytest.mark.parametrize("end", ENDS)
def test_file_saved_last_holds_precise_statistics(tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer, saver, others = ENDS[end]
    arguments = {"every_n_validations": 2} if end == "every n-th validation" else {}
    with caplog.at_level(logging.INFO):
        module, callback, saved = run(tmp_path, trainer, saver, others(), **arguments)
    assert saved
    assert callback.last is not None
    assert {name: bits(value) for name, value in state_of(saved[-1]).items()} == state_bits(module)
    used = RECALIBRATED_FROM or module.validated[-1][2]
    assert_all_statistics(module.net, layer_inputs(module.net.train(), used[-3:], NORMS))
    assert "saved last" not in caplog.text


def state_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


@pytest.mark.parametrize("end", ["max_steps in mid-epoch", "early stopping without validation"])
def test_it_holds_those_of_the_averaged_weights_where_these_are_saved(tmp_path: Path, end: str) -> None:
    trainer, saver, others = ENDS[end]
    module, _, saved = run(tmp_path, trainer, saver, [EMAWeightAveraging(decay=0.5), *others()])
    held = copy.deepcopy(module)
    held.load_state_dict(state_of(saved[-1]))
    assert_all_statistics(held.net, layer_inputs(held.net.train(), RECALIBRATED_FROM[-3:], NORMS))
    assert {name: bits(value) for name, value in state_of(saved[-1]).items()} == state_bits(module)


@pytest.mark.parametrize("end", ["early stopping without validation", "max_steps in mid-epoch"])
def test_weights_are_those_of_the_fit_without_the_callback(tmp_path: Path, end: str) -> None:
    trainer, saver, others = ENDS[end]
    module, _, _ = run(tmp_path, trainer, saver, others())
    pl.seed_everything(3, verbose=False)
    alone = Logging()
    quiet(callbacks=others(), num_sanity_val_steps=0, **trainer).fit(alone, train_loader(), val_loader())
    assert [bits(weight) for weight in module.parameters()] == [bits(weight) for weight in alone.parameters()]


def test_stop_that_is_not_allowed_yet_is_no_end(tmp_path: Path) -> None:
    trainer = {"limit_val_batches": 0, "max_epochs": 4, "min_epochs": 4}
    RECALIBRATED_FROM.clear()
    _, _, saved = run(tmp_path, trainer, EACH_EPOCH, [stopped_early()])
    assert len(saved) == 4
    assert len(RECALIBRATED_FROM) == 3


def test_one_line_says_where_the_last_file_came_too_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _, _, saved = run(tmp_path, {}, {"save_top_k": -1, "every_n_train_steps": 3}, [])
    assert [path.name for path in saved] == ["step=3.ckpt", "step=6.ckpt"]
    assert caplog.text.count("the last checkpoint, saved at step 6, holds the moving average of that step") == 1


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 6:
            raise Broken


def test_one_line_says_what_a_file_saved_after_an_exception_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = PreciseBatchNorm(num_batches=3)
    skip_without(ModelCheckpoint, "save_on_exception")
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_on_exception=True, every_n_epochs=5)
    trainer = quiet(callbacks=[callback, Fails(), saver], enable_checkpointing=True)
    with caplog.at_level(logging.INFO), pytest.raises(Broken):
        trainer.fit(Classifier(), train_loader(), val_loader())
    assert [path.name for path in tmp_path.iterdir()] == ["step=6.ckpt"]
    assert caplog.text.count("the last checkpoint, saved at step 6, holds the moving average of that step") == 1
    assert "save_checkpoint" not in vars(trainer)


def test_what_somebody_put_in_the_place_of_the_method_is_called_and_stays() -> None:
    calls: list[Any] = []
    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=1), PreciseBatchNorm(num_batches=1, name="second")])
    trainer.save_checkpoint = lambda *args, **kwargs: calls.append(args)  # type: ignore[method-assign]
    own = trainer.save_checkpoint
    trainer.fit(Saves(), train_loader(), val_loader())
    assert calls == [("here",)] * 2
    assert trainer.save_checkpoint is own


class Saves(Classifier):
    def on_train_epoch_end(self) -> None:
        self.trainer.save_checkpoint("here")


class SavesAt(pl.Callback):
    """Somebody who saves in the middle of each batch, whose step is still to come."""

    def __init__(self, hook: str, folder: Path) -> None:
        setattr(self, hook, lambda trainer, *args: trainer.save_checkpoint(folder / "middle.ckpt"))


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_file_saved_before_the_last_step_is_not_taken_for_the_last(tmp_path: Path, hook: str) -> None:
    trainer, saver, _ = ENDS["weights alone"]
    module, _, saved = run(tmp_path, trainer, saver, [SavesAt(hook, tmp_path)])
    assert {name: bits(value) for name, value in state_of(saved[-1]).items()} == state_bits(module)
    assert_all_statistics(module.net, layer_inputs(module.net.train(), RECALIBRATED_FROM[-3:], NORMS))


def test_epoch_that_never_ran_is_none_in_which_it_should(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, saver, _ = ENDS["weights alone"]
    with caplog.at_level(logging.INFO):
        module, callback, saved = run(tmp_path, trainer, saver, [], start_epoch=2)
    assert callback.last is None
    assert "epoch 2" not in caplog.text
    assert {name: bits(value) for name, value in state_of(saved[-1]).items()} == state_bits(module)
