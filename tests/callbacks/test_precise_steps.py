"""Steps that do more than run the network: what PreciseBatchNorm bears, and what it refuses by name."""

import copy
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bn import PreciseBatchNorm
from lightning_bn.callbacks._second_run import long_pass
from lightning_bn.functional import recalibrate, take_snapshot
from tests.averages import EMAWeightAveraging
from tests.callbacks.fits import Classifier, quiet, train_loader, trajectory, val_loader
from tests.callbacks.freezing_fits import said


def data() -> dict[str, Any]:
    return {"train_dataloaders": train_loader(), "val_dataloaders": val_loader()}


def test_a_step_may_use_the_folder_of_its_logger(tmp_path) -> None:
    class Writes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert str(self.logger.save_dir) in str(self.logger.log_dir)
            return super().training_step(batch, batch_idx)

    precise = PreciseBatchNorm(num_batches=2)
    quiet(callbacks=[precise], logger=CSVLogger(tmp_path)).fit(Writes(), **data())
    assert precise.last is not None


def test_a_scheduler_that_the_step_turns_is_where_it_was() -> None:
    class Turns(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.lr_schedulers().step()
            return super().training_step(batch, batch_idx)

    trace, parameters, _ = trajectory(Turns, data, PreciseBatchNorm(num_batches=3))
    expected_trace, expected, _ = trajectory(Turns, data)
    assert trace == expected_trace
    assert parameters == expected


def test_a_step_that_writes_to_a_trained_weight_is_refused_by_name_and_the_weight_put_back() -> None:
    class Projects(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.net.bn.weight.clamp_(max=0.9)
            return super().training_step(batch, batch_idx)

    module = Projects()
    module.on_validation_start = lambda: module.net.bn.weight.data.fill_(2.0)
    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=2)])
    with pytest.raises(MisconfigurationException, match=r"trained weight 'net\.bn\.weight'.*step='forward'"):
        trainer.fit(module, **data())
    assert module.net.bn.weight.eq(2.0).all()


def test_a_pass_that_takes_long_says_so_once(monkeypatch) -> None:
    monkeypatch.setattr(long_pass, "LONG", 0.0)
    with said() as lines:
        quiet(callbacks=[PreciseBatchNorm(num_batches=3)], max_epochs=1).fit(Classifier(), **data())
    assert sum("recalibrating" in line for line in lines) == 1


def test_two_of_them_in_one_trainer_have_names() -> None:
    first, second = PreciseBatchNorm(num_batches=1), PreciseBatchNorm(num_batches=2, name="second")
    quiet(callbacks=[first, second], max_epochs=1).fit(Classifier(), **data())
    assert first.last is not None
    assert second.last is not None
    assert first.state_key != second.state_key


def data_in_order() -> dict[str, Any]:
    return {"train_dataloaders": train_loader(shuffle=False), "val_dataloaders": val_loader()}


@pytest.mark.parametrize("first", ["precise", "averaging"])
def test_without_validation_the_checkpoint_of_an_average_is_precise(tmp_path, first: str) -> None:
    precise, averaging = PreciseBatchNorm(num_batches=8), EMAWeightAveraging(decay=0.5)
    callbacks = [precise, averaging] if first == "precise" else [averaging, precise]
    saver = ModelCheckpoint(tmp_path, save_last=True)
    module = Classifier(dropout=0.0)
    quiet(callbacks=[*callbacks, saver], enable_checkpointing=True, limit_val_batches=0).fit(module, **data_in_order())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    net = copy.deepcopy(module.net)
    net.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    written = take_snapshot(net)
    recalibrate(net.train(), train_loader(shuffle=False))
    expected = take_snapshot(net)
    assert torch.allclose(written.mean, expected.mean, atol=1e-5)
    assert torch.allclose(written.var, expected.var, rtol=1e-4)


@pytest.mark.parametrize("first", ["precise", "averaging"])
def test_what_is_left_after_training_that_stopped_between_validations_is_precise(first: str) -> None:
    precise = PreciseBatchNorm(num_batches=8)
    module = Classifier(dropout=0.0)
    loaders = {"train_dataloaders": train_loader(shuffle=False), "val_dataloaders": val_loader()}
    callbacks = [precise, EMAWeightAveraging(decay=0.5)]
    callbacks = callbacks if first == "precise" else callbacks[::-1]
    quiet(callbacks=callbacks, max_steps=6, val_check_interval=4).fit(module, **loaders)
    left = take_snapshot(module)
    recalibrate(module.net.train(), train_loader(shuffle=False))
    expected = take_snapshot(module)
    assert torch.allclose(left.mean, expected.mean, atol=1e-5)
    assert torch.allclose(left.var, expected.var, rtol=1e-4)


def test_one_callback_used_for_two_trainers_begins_anew() -> None:
    precise = PreciseBatchNorm(num_batches=2, every_n_validations=2)
    for _ in range(2):
        precise.last = None
        quiet(callbacks=[precise], max_epochs=3).fit(Classifier(), **data())
        assert precise.state_dict()["validations"] == 3
        assert precise.last is not None
