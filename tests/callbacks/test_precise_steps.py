"""Steps that do more than run the network: what PreciseBatchNorm bears, and what it refuses by name."""

from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bn import PreciseBatchNorm
from lightning_bn.callbacks import precise as precise_module
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
    monkeypatch.setattr(precise_module, "_LONG", 0.0)
    with said() as lines:
        quiet(callbacks=[PreciseBatchNorm(num_batches=3)], max_epochs=1).fit(Classifier(), **data())
    assert sum("recalibrating" in line for line in lines) == 1


def test_two_of_them_in_one_trainer_have_names() -> None:
    first, second = PreciseBatchNorm(num_batches=1), PreciseBatchNorm(num_batches=2, name="second")
    quiet(callbacks=[first, second], max_epochs=1).fit(Classifier(), **data())
    assert first.last is not None
    assert second.last is not None
    assert first.state_key != second.state_key
