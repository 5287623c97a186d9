"""What a step, a callback and the configuring of optimizers do while a fit is diagnosed is put back."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_bn import diagnose
from tests.callbacks.fits import quiet
from tests.callbacks.test_diagnose import Finetuning, Patient, batch
from tests.models import images
from tests.oracle import everything, generators


class ChangesAll(Finetuning):
    """Changes statistics, momentum, modes and itself while it freezes."""

    def __init__(self) -> None:
        super().__init__(train_bn=False)
        self.calls, self.frozen = 0, [""]

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        super().freeze_before_training(pl_module)
        self.calls += 1
        self.frozen.append("backbone")
        assert self.calls == 1
        pl_module.extra = 1
        norm = pl_module.backbone.bn1.eval()
        norm.momentum = 0.7
        norm.running_mean.add_(5)


def test_freezing_of_a_callback_is_tried_once_and_put_back() -> None:
    module, callback = Patient(), ChangesAll()
    trainer = quiet(callbacks=[callback])
    before = everything(module)
    assert "frozen-by-finetuning" in {finding.rule for finding in diagnose(module, trainer)}
    assert everything(module) == before
    assert (callback.calls, callback.frozen) == (0, [""])


class Remembers(Patient):
    """Keeps its schedule and counts while it configures optimizers."""

    def configure_optimizers(self) -> Any:
        self.losses.append(1.0)
        self.schedule = torch.rand(3)
        return super().configure_optimizers()


def test_what_configuring_optimizers_leaves_behind_is_forgotten() -> None:
    module = Remembers(decay=0.1)
    before, state = everything(module), generators()
    assert "affine-under-weight-decay" in {finding.rule for finding in diagnose(module, quiet())}
    assert (everything(module), module.losses, generators()) == (before, [0.0], state)


class ScalesItsBatch(Patient):
    """Writes to its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(3)
        return super().training_step(batch, batch_idx)


def test_a_step_that_writes_to_its_batch_starts_anew_each_time() -> None:
    given = batch()
    diagnose(ScalesItsBatch(), quiet(), given, more_batches=[given])
    assert torch.equal(given[0], images(8))


class KeepsFeatures(Patient):
    """Keeps on itself what its first layer is given, for a callback to draw."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.backbone[0](x)
        return self.head(self.backbone[1](self.features).mean((2, 3))[:, :2])


def test_the_bias_of_an_output_that_a_step_keeps_is_not_lost() -> None:
    assert diagnose(KeepsFeatures(), quiet(), batch()) == []
