"""What a Trainer shows beside its model: each rule finds the fit with the fault, and not the one without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning, BaseFinetuning
from pytorch_lightning.callbacks import StochasticWeightAveraging as SWA
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_bn
from lightning_bn import BatchNormFreezer, Finding, PreciseBatchNorm, TaskBatchNorm, diagnose
from lightning_bn.callbacks._doctor.all_rules import FIT_RULES
from tests.averages import EMAWeightAveraging
from tests.callbacks.fits import quiet, train_loader
from tests.models import SmallResNet, fill_statistics, images, seeded
from tests.oracle import everything, generators


class Drops(nn.Module):
    """A block that drops its branch by its own flag, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn(self.conv(x))
        if self.training:
            branch = branch * (torch.rand(len(x), 1, 1, 1) < 0.5) / 0.5
        return x + branch


class Patient(pl.LightningModule):
    """A backbone and a head, which trains all that it is told to; logs and counts in its step."""

    def __init__(
        self,
        backbone: Callable[[], nn.Module] = SmallResNet,
        *,
        decay: float = 0.0,
        only: str = "",
        filled: bool = True,
        manual: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = seeded(backbone)
        if filled:
            fill_statistics(self.backbone)
        self.head = nn.Linear(2, 2)
        self.decay, self.only, self.steps, self.losses = decay, only, 0, [0.0]
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        out = self.backbone(x)
        return self.head(out.mean((2, 3))[:, :2] if out.dim() == 4 else out)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        self.log("loss", loss, on_step=True)
        if not self.automatic_optimization:
            self.manual_backward(loss)
        return loss

    def configure_optimizers(self) -> Any:
        parameters = self.get_submodule(self.only).parameters() if self.only else self.parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.1, weight_decay=self.decay)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class OfTwoLoaders(Patient):
    """Each part of a batch through one backbone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack([F.cross_entropy(self(x), y) for x, y in batch.values()]).sum()


class Finetuning(BaseFinetuning):
    """Freezes the backbone."""

    def __init__(self, train_bn: bool) -> None:
        super().__init__()
        self.with_bn = train_bn

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=self.with_bn)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        """Never unfreezes."""


def batch(samples: int = 8, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    return images(samples) + shift, torch.arange(samples) % 2


def parts(shift: float) -> dict[str, Any]:
    return {"digits": batch(), "parity": batch(shift=shift)}


def fresh() -> Patient:
    """All affine parameters are ones and zeros."""
    return Patient(filled=False)


Made = Callable[[], tuple[pl.LightningModule, pl.Trainer, Any]]


@dataclass(frozen=True)
class Fit:
    """A rule with a fit that has the fault and one that has not."""

    rule: str
    ill: Made
    well: Made
    name: str = ""


FITS = [
    Fit(
        "frozen-by-finetuning",
        lambda: (Patient(), quiet(callbacks=[Finetuning(train_bn=False)]), None),
        lambda: (Patient(), quiet(callbacks=[Finetuning(train_bn=True)]), None),
    ),
    Fit(
        "frozen-by-finetuning",
        lambda: (Patient(), quiet(callbacks=[BackboneFinetuning(train_bn=False)]), None),
        lambda: (Patient(), quiet(callbacks=[BackboneFinetuning()]), None),
        "backbone",
    ),
    Fit(
        "skipped-when-unfrozen",
        lambda: (fresh(), quiet(callbacks=[Finetuning(train_bn=False)]), None),
        lambda: (Patient(), quiet(callbacks=[Finetuning(train_bn=False)]), None),
    ),
    Fit(
        "not-in-optimizer",
        lambda: (Patient(only="head"), quiet(), None),
        lambda: (Patient(only="head"), quiet(callbacks=[BatchNormFreezer("backbone")]), None),
    ),
    Fit(
        "not-in-optimizer",
        lambda: (Patient(only="head"), quiet(callbacks=[BatchNormFreezer("backbone", stop_epoch=1)]), None),
        lambda: (Patient(), quiet(callbacks=[BatchNormFreezer("backbone", stop_epoch=1)]), None),
        "after a freeze",
    ),
    Fit("affine-under-weight-decay", lambda: (Patient(decay=0.1), quiet(), None), lambda: (Patient(), quiet(), None)),
    Fit(
        "averaged-without-recalibration",
        lambda: (Patient(), quiet(callbacks=[EMAWeightAveraging()]), None),
        lambda: (Patient(), quiet(callbacks=[EMAWeightAveraging(), PreciseBatchNorm()]), None),
    ),
    Fit(
        "averaged-without-recalibration",
        lambda: (Patient(), quiet(callbacks=[EMAWeightAveraging()]), None),
        lambda: (Patient(), quiet(callbacks=[SWA(0.1)]), None),
        "SWA recalibrates",
    ),
    Fit(
        "noise-in-recalibration",
        lambda: (noisy(), quiet(callbacks=[PreciseBatchNorm()]), batch(64)),
        lambda: (noisy(), quiet(callbacks=[PreciseBatchNorm(containers_in_eval=True)]), batch(64)),
    ),
    Fit(
        "noise-in-recalibration",
        lambda: (noisy(), quiet(callbacks=[PreciseBatchNorm()]), batch(64)),
        lambda: (Patient(), quiet(callbacks=[PreciseBatchNorm()]), batch(64)),
        "no noise",
    ),
    Fit(
        "not-synchronized",
        lambda: (Patient(), quiet(devices=2, strategy="ddp"), batch(4)),
        lambda: (Patient(), quiet(devices=2, strategy="ddp", sync_batchnorm=True), batch(4)),
    ),
    Fit(
        "not-synchronized",
        lambda: (Patient(), quiet(devices=2, strategy="ddp"), batch(4)),
        lambda: (Patient(), quiet(devices=2, strategy="ddp"), batch(16)),
        "enough samples",
    ),
    Fit(
        "synchronized-alone",
        lambda: (Patient(), quiet(sync_batchnorm=True), None),
        lambda: (Patient(), quiet(devices=2, strategy="ddp", sync_batchnorm=True), None),
    ),
    # Rules about the model, in a fit that changes what they say.
    Fit(
        "unlike-inputs",
        lambda: (two_loaders(), quiet(), parts(shift=9.0)),
        lambda: (two_loaders(), quiet(callbacks=[TaskBatchNorm(["digits", "parity"])]), parts(shift=9.0)),
    ),
    Fit(
        "initial-statistics-frozen",
        lambda: (fresh(), quiet(callbacks=[BatchNormFreezer()]), None),
        lambda: (Patient(), quiet(callbacks=[BatchNormFreezer()]), None),
    ),
    Fit(
        "frozen-by-requires-grad",
        lambda: (by_requires_grad(), quiet(callbacks=[BatchNormFreezer(start_epoch=1)]), None),
        lambda: (by_requires_grad(), quiet(callbacks=[BatchNormFreezer()]), None),
    ),
    Fit(
        "few-values",
        lambda: (Patient(), quiet(devices=2, strategy="ddp"), batch(4)),
        lambda: (Patient(), quiet(devices=2, strategy="ddp", sync_batchnorm=True), batch(4)),
    ),
]


def two_loaders() -> Patient:
    return OfTwoLoaders(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))


def noisy() -> Patient:
    return Patient(lambda: nn.Sequential(*(Drops() for _ in range(3))))


def by_requires_grad() -> Patient:
    module = Patient()
    module.backbone.requires_grad_(False)
    return module


BY_NAME = [pytest.param(one, id=f"{one.rule} {one.name}".strip()) for one in FITS]


def found(made: tuple[pl.LightningModule, pl.Trainer, Any], rule: str = "") -> list[Finding]:
    return [finding for finding in diagnose(*made) if not rule or finding.rule == rule]


@pytest.mark.parametrize("fit", BY_NAME)
def test_the_fault_is_found(fit: Fit) -> None:
    [finding] = found(fit.ill(), fit.rule)
    severities = {rule.name: rule.severity for rule in FIT_RULES}
    assert finding.severity == severities.get(fit.rule, "fault")
    assert finding.layers
    assert finding.what.endswith(".")
    assert finding.what.count(". ") == 0
    assert "(" in finding.remedy or "=" in finding.remedy


@pytest.mark.parametrize("fit", BY_NAME)
def test_a_fit_without_the_fault_is_not_accused_of_it(fit: Fit) -> None:
    assert found(fit.well(), fit.rule) == []


def test_each_rule_has_a_fit() -> None:
    assert {rule.name for rule in FIT_RULES} <= {fit.rule for fit in FITS}


@pytest.mark.parametrize("fit", BY_NAME)
def test_module_and_generators_are_left_as_they_were(fit: Fit) -> None:
    module, trainer, given = fit.ill()
    before, state = everything(module), generators()
    stage, loggers = trainer.state.stage, trainer.loggers
    diagnose(module, trainer, given)
    assert everything(module) == before
    assert generators() == state
    assert (trainer.state.stage, trainer.loggers) == (stage, loggers)
    assert module._trainer is None


def test_what_the_step_counts_and_appends_is_forgotten() -> None:
    module = Patient()
    diagnose(module, quiet(), batch())
    assert module.steps == 0
    assert module.losses == [0.0]


def test_healthy_fits_have_no_fault_before_and_after_training() -> None:
    module, trainer = Patient(), quiet(callbacks=[PreciseBatchNorm(2)], limit_val_batches=0)
    before = diagnose(module, trainer, batch())
    trainer.fit(module, train_loader())
    after = diagnose(module, trainer, batch())
    for findings in (before, after):
        assert {finding.rule for finding in findings} == {"bias-before-batch-norm"}


def test_a_step_under_manual_optimization_is_not_run() -> None:
    module = Patient(manual=True)
    module.discriminator = nn.BatchNorm1d(2)  # which forward() does not call
    rules = {finding.rule for finding in diagnose(module, quiet(), batch(4))}
    # the network itself was
    assert rules == {"few-values", "bias-before-batch-norm"}


def test_in_the_middle_of_a_fit_it_changes_nothing() -> None:
    rules: set[str] = set()

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rules.update(finding.rule for finding in diagnose(pl_module, trainer, batch))

    def state(*callbacks: pl.Callback) -> list[bytes]:
        pl.seed_everything(3, verbose=False)
        module = Patient()
        quiet(callbacks=list(callbacks), limit_val_batches=0).fit(module, train_loader())
        return [value.numpy().tobytes() for value in module.state_dict().values()]

    assert state(Looks()) == state()
    assert "bias-before-batch-norm" in rules


def test_without_a_trainer_it_is_the_ground_floors() -> None:
    net = seeded(SmallResNet)
    assert diagnose(net, None, images()) == lightning_bn.functional.diagnose(net, images())


def test_a_module_of_the_other_namespace_is_diagnosed_too() -> None:
    EMAWeightAveraging()  # skips the test where there is none
    import lightning.pytorch as other
    from lightning.pytorch.callbacks import EMAWeightAveraging as OthersEMA

    class Others(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = fill_statistics(seeded(SmallResNet))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)

    trainer = other.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[OthersEMA()], enable_progress_bar=False
    )
    rules = [finding.rule for finding in diagnose(Others(), trainer, batch())]  # type: ignore[arg-type]
    assert rules == ["averaged-without-recalibration", "bias-before-batch-norm", "affine-under-weight-decay"]
