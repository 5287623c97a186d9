"""What a rule could not look at, since code of the user's own raised an error, is said, and other rules go on."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_bn import BatchNormFreezer, PreciseBatchNorm, TaskBatchNorm, diagnose
from lightning_bn.callbacks.diagnosis import diagnosis
from tests.callbacks.fits import quiet
from tests.callbacks.test_diagnose import Finetuning, Patient, batch, noisy


class AsksForTraining(Patient):
    """Its step needs what evaluation has not."""

    def training_step(self, given: Any, batch_idx: int) -> Tensor:
        if not all(module.training for module in self.backbone.modules()):
            raise KeyError("loss")
        return super().training_step(given, batch_idx)


class LosesItsBackbone(Finetuning):
    """Freezes a part that the module lacks, after one that it has."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        super().freeze_before_training(pl_module)
        self.freeze(pl_module.decoder)


class NoOptimizers(Patient):
    """Needs a Trainer's schedule."""

    def configure_optimizers(self) -> Any:
        raise LookupError("no schedule")


@pytest.mark.parametrize(
    ("module", "callback", "what", "why"),
    [
        (AsksForTraining, PreciseBatchNorm(), "noise-in-recalibration", "KeyError: 'loss'"),
        (Patient, LosesItsBackbone(train_bn=False), "what LosesItsBackbone freezes", "AttributeError: 'Patient'"),
        (Patient, BatchNormFreezer("bakbone"), "what BatchNormFreezer freezes", "bakbone"),
        (Patient, TaskBatchNorm(["a", "b"], "bakbone"), "what TaskBatchNorm gives statistics per task", "bakbone"),
        (NoOptimizers, pl.Callback(), "the optimizers", "LookupError: no schedule"),
    ],
)
def test_what_raises_is_named_with_the_error(module: Any, callback: pl.Callback, what: str, why: str) -> None:
    patient = module()
    patient.backbone.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in patient.parameters()]
    found = diagnosis(patient, quiet(callbacks=[callback]), [batch(16)])
    assert list(found.missing) == [what]
    assert why in found.missing[what]
    assert "frozen-by-requires-grad" in {finding.rule for finding in found.findings}
    assert [parameter.requires_grad for parameter in patient.parameters()] == trained
    with pytest.warns(UserWarning, match=f"^diagnose: not looked at: {what} .*{why.split(':', maxsplit=1)[0]}"):
        assert diagnose(patient, quiet(callbacks=[callback]), batch(16)) == found.findings


def test_of_two_callbacks_the_one_that_raises_does_not_hide_the_other() -> None:
    callbacks = [LosesItsBackbone(train_bn=False), Finetuning(train_bn=False)]
    found = diagnosis(Patient(), quiet(callbacks=callbacks))
    assert "frozen-by-finetuning" in {finding.rule for finding in found.findings}
    freezers = [BatchNormFreezer("bakbone"), BatchNormFreezer("backbone", stop_epoch=1)]
    found = diagnosis(Patient(only="head"), quiet(callbacks=freezers))
    assert list(found.missing) == ["what BatchNormFreezer freezes"]
    assert "not-in-optimizer" in {finding.rule for finding in found.findings}


def test_nothing_is_missing_where_nothing_raises() -> None:
    found = diagnosis(noisy(), quiet(callbacks=[PreciseBatchNorm(), Finetuning(train_bn=True)]), [batch(64)])
    assert (found.missing, found.notes) == ({}, ())
    assert "noise-in-recalibration" in {finding.rule for finding in found.findings}


def test_that_a_step_under_manual_optimization_is_not_run_is_said() -> None:
    [note] = diagnosis(Patient(manual=True), quiet(), [batch(8)]).notes
    assert note.startswith("training_step was not run")


def test_one_image_of_each_process_is_a_matter_of_synchronization() -> None:
    def said(**settings: Any) -> set[tuple[str, str]]:
        module = Patient(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
        return {(one.rule, one.severity) for one in diagnose(module, quiet(**settings), batch(1))}

    assert said() == {("few-values", "advice")}
    assert said(devices=2, strategy="ddp") == {("not-synchronized", "fault")}
    assert said(devices=2, strategy="ddp", sync_batchnorm=True) == set()


class OnlyTrains(nn.Module):
    """Skips its branch, and cannot be evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("no head to evaluate")
        return self.trunk(x)


def test_a_forward_in_eval_mode_that_fails_is_said_of_what_it_may_have_reached() -> None:
    [finding] = diagnose(OnlyTrains(), None, torch.randn(16, 4))
    assert (finding.rule, finding.layers) == ("never-reached", ("branch",))
    assert finding.what.endswith("in eval mode, which ends with an error (RuntimeError: no head to evaluate).")


class MadeLater(Patient):
    """Makes its network when a fit begins."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.backbone = [self.backbone], nn.Identity()

    def configure_model(self) -> None:
        self.backbone = self.made[0]


def test_layers_that_a_fit_is_yet_to_make_are_said() -> None:
    module = MadeLater()
    with pytest.warns(UserWarning, match=r"what configure_model may make \(.* call configure_model\(\) first\)"):
        assert diagnose(module, quiet()) == []
    module.configure_model()
    assert {finding.rule for finding in diagnose(module, quiet(), batch(16))} == {"bias-before-batch-norm"}
