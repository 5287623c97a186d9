"""Frozen is what stands under the name, whatever happens to the object, and from the sanity check on."""

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_bn import BatchNormFreezer, PreciseBatchNorm
from lightning_bn.functional import take_snapshot
from tests.callbacks.freezing_fits import BODY, PretrainedClassifier, fit, freezer, layers, said, values
from tests.models import bits, fill_statistics


def test_a_layer_that_is_replaced_in_mid_fit_is_frozen_too_with_the_kept_values() -> None:
    class Replaces(PretrainedClassifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net.body[1] = nn.BatchNorm1d(4)

    module, frozen = Replaces(), freezer()
    before = values(PretrainedClassifier(), BODY)
    with pytest.warns(UserWarning, match=r"net\.body\.1 \(layer \(replaced by another layer\)"):
        fit(module, frozen)
    assert values(module, BODY) == before
    assert frozen.report is not None
    assert not frozen.report.identical


def test_affine_parameters_of_a_parametrized_layer_do_not_move() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    module, frozen = PretrainedClassifier(), freezer()
    parametrize.register_parametrization(module.net.body[1], "weight", Halved())
    original = module.net.body[1].parametrizations.weight.original
    before = bits(original)
    fit(module, frozen)
    assert bits(original) == before
    assert frozen.report is not None
    assert frozen.report.identical


def test_statistics_do_not_move_in_a_sanity_check_in_train_mode() -> None:
    class TrainsInThere(PretrainedClassifier):
        def on_validation_model_eval(self) -> None:
            self.train()

    module, frozen = TrainsInThere(), freezer()
    before = values(PretrainedClassifier(), BODY)
    fit(module, frozen, num_sanity_val_steps=2)
    assert values(module, BODY) == before


def test_what_a_later_freeze_holds_are_the_precise_statistics_also_where_others_are_restored() -> None:
    expected = {}

    class Notes(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 0 and not trainer.sanity_checking:
                expected["body"] = take_snapshot(pl_module, "net.body")

    precise, module = PreciseBatchNorm(num_batches=4, restore=True), PretrainedClassifier()
    fit(module, precise, freezer(start_epoch=1), Notes(), max_epochs=2)
    assert take_snapshot(module, "net.body").same_bits(expected["body"])


def test_what_became_of_another_plan_is_not_counted_in_this_one(tmp_path) -> None:
    first = fit(PretrainedClassifier(), freezer(), max_epochs=1)
    first.save_checkpoint(tmp_path / "last.ckpt")
    frozen = BatchNormFreezer("body.1", root="net")
    with pytest.warns(UserWarning, match="another plan"):
        fit(PretrainedClassifier(), frozen, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert frozen.report is not None
    assert frozen.report.steps == 4


def test_a_schedule_that_is_never_reached_is_said_and_proves_nothing() -> None:
    frozen = freezer(start_epoch=50)
    with said() as lines:
        fit(PretrainedClassifier(), frozen)
    assert any("from epoch 50 is not reached with max_epochs=2" in line for line in lines)
    assert any("the freeze was never on" in line for line in lines)


def test_a_model_of_many_layers_is_planned_in_one_walk() -> None:
    # Quadratic in the layers this took minutes.
    net = fill_statistics(nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(2000))))
    assert len(BatchNormFreezer().plan(net).frozen) == len(layers(net)) == 2000


def test_a_layer_that_cannot_be_frozen_leaves_all_as_they_were() -> None:
    from lightning_bn.functional import freeze_batch_norm

    class Refuses(nn.BatchNorm1d):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "training" and value is False:
                raise RuntimeError("not me")
            super().__setattr__(name, value)

    net = fill_statistics(nn.Sequential(nn.BatchNorm1d(2), Refuses(2)))
    with pytest.raises(RuntimeError, match="not me"):
        freeze_batch_norm(net)
    assert type(net[0]) is nn.BatchNorm1d
    assert net[0].training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert torch.is_grad_enabled()
