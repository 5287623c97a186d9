"""When a freeze is on: a pure function of the Trainer's counters, resumed or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_bn import BatchNormFreezer, PreciseBatchNorm
from tests.callbacks.freezing_fits import (
    BATCHES,
    BODY,
    HEAD,
    Hooked,
    Located,
    PretrainedClassifier,
    Watch,
    adamw,
    fit,
    freezer,
    layers,
    resumed_in_mid_epoch,
    sgd,
    state,
    values,
)
from tests.models import bits

#: Settings, and for each of the twelve steps of three epochs whether the layers are frozen (x) or train (.).
SCHEDULES = [
    ({}, "xxxx xxxx xxxx"),
    ({"start_epoch": 0}, "xxxx xxxx xxxx"),
    ({"start_epoch": 1}, ".... xxxx xxxx"),
    ({"stop_epoch": 1}, "xxxx .... ...."),
    ({"start_epoch": 1, "stop_epoch": 2}, ".... xxxx ...."),
    ({"start_epoch": -1}, ".... .... xxxx"),
    ({"start_epoch": -2}, ".... xxxx xxxx"),
    ({"stop_epoch": -1}, "xxxx xxxx ...."),
    ({"start_epoch": -2, "stop_epoch": -1}, ".... xxxx ...."),
    ({"start_epoch": 1, "stop_epoch": -1}, ".... xxxx ...."),
    ({"start_epoch": -20}, "xxxx xxxx xxxx"),
    ({"start_epoch": 3}, ".... .... ...."),
    ({"start_step": 5}, ".... .xxx xxxx"),
    ({"stop_step": 6}, "xxxx xx.. ...."),
    ({"start_step": 2, "stop_step": 9}, "..xx xxxx x..."),
    ({"start_step": 2, "stop_epoch": 1}, "..xx .... ...."),
    ({"start_epoch": 1, "stop_step": 6}, ".... xx.. ...."),
]
schedules = pytest.mark.parametrize(("settings", "expected"), SCHEDULES, ids=str)


def as_flags(expected: str) -> list[bool]:
    return [mark == "x" for mark in expected.replace(" ", "")]


@pytest.mark.parametrize("interval", [1.0, 1], ids=["validation at the end", "validation after every batch"])
@schedules
def test_the_layers_are_frozen_in_these_steps_and_train_in_all_others(
    settings: dict[str, int], expected: str, interval: float
) -> None:
    module, watch, frozen = PretrainedClassifier(), Watch(), freezer(**settings)
    fit(module, watch, frozen, max_epochs=3, val_check_interval=interval)
    flags = as_flags(expected)
    for name in BODY:
        assert [not moved[name] for moved in watch.stats] == flags
        assert [not moved[name] for moved in watch.affine] == flags
    assert all(moved[HEAD] for moved in watch.stats)
    assert frozen.report is not None
    assert frozen.report.identical
    assert frozen.report.steps == sum(flags)


def test_steps_are_optimizer_steps_under_gradient_accumulation() -> None:
    module, watch, frozen = PretrainedClassifier(), Watch(), freezer(start_step=1, stop_step=3)
    fit(module, watch, frozen, accumulate_grad_batches=2, max_epochs=2)
    assert [not moved[BODY[0]] for moved in watch.stats] == as_flags("..xx xx..")
    assert frozen.report is not None
    assert frozen.report.steps == 2


def test_a_freeze_that_ends_leaves_the_layers_as_if_by_hand() -> None:
    class ByHand(PretrainedClassifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            for name in BODY:
                layers(self)[name].train(not self.global_step < BATCHES + 1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step < BATCHES + 1:
                for name in BODY:
                    for parameter in layers(self)[name].parameters():
                        parameter.grad = None

    module, by_hand = PretrainedClassifier(optimizer=adamw), ByHand(optimizer=adamw)
    fit(module, freezer(stop_step=BATCHES + 1), max_epochs=3)
    fit(by_hand, max_epochs=3)
    assert state(module) == state(by_hand)


@pytest.mark.parametrize("settings", [{"start_epoch": -2}, {"stop_epoch": -1}])
def test_epochs_that_count_from_an_end_that_is_not_known_are_an_error(settings: dict[str, int]) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"=-\d.*max_epochs=-1.*set max_epochs, or use start_step and stop_step"
    ):
        fit(PretrainedClassifier(), freezer(**settings), max_epochs=-1, max_steps=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start_epoch": 2, "stop_epoch": 2}, "freezes nothing"),
        ({"start_epoch": -1, "stop_epoch": -3}, "freezes nothing"),
        ({"start_step": 4, "stop_step": 3}, "freezes nothing"),
        ({"start_step": -1}, "start_step=-1 must be a whole number, 0 or more"),
        ({"stop_step": -5}, "stop_step=-5 must be a whole number, 0 or more"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_when_it_is_made(settings: dict[str, int], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"BatchNormFreezer: .*{said}"):
        freezer(**settings)


@resumed_in_mid_epoch
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@schedules
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one_bit_for_bit(
    settings: dict[str, int], expected: str, optimizer: Any, tmp_path: Path
) -> None:
    def run(ckpt_path: Path | None = None) -> Any:
        module, frozen, watch = Located(optimizer=optimizer), freezer(**settings), Watch()
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=BATCHES + 2)
        trainer = fit(module, watch, frozen, keep, ckpt_path=ckpt_path, max_epochs=3)
        moments = trainer.optimizers[0].state_dict()["state"]
        kept = [(key, bits(torch.as_tensor(value))) for of in moments.values() for key, value in of.items()]
        return (state(module), kept, frozen.report), watch.stats

    whole, _ = run()
    resumed, watched = run(tmp_path / f"step={BATCHES + 2}.ckpt")
    assert resumed == whole
    assert [not moved[BODY[0]] for moved in watched] == as_flags(expected)[BATCHES + 2 :]


def test_a_resumed_run_that_trains_longer_counts_from_its_own_end(tmp_path: Path) -> None:
    def run(max_epochs: int, ckpt_path: Path | None = None) -> list[bool]:
        watch = Watch()
        keep = ModelCheckpoint(tmp_path, "last", every_n_epochs=2)
        fit(Located(), watch, freezer(start_epoch=-1), keep, ckpt_path=ckpt_path, max_epochs=max_epochs)
        return [not moved[BODY[0]] for moved in watch.stats]

    assert run(2) == as_flags(".... xxxx")
    assert run(4, tmp_path / "last.ckpt") == as_flags(".... xxxx")


@pytest.mark.parametrize("freezer_first", [True, False])
def test_what_the_last_epochs_freeze_are_the_precise_statistics(freezer_first: bool) -> None:
    module, watch, frozen = PretrainedClassifier(), Watch(), freezer(start_epoch=-1)
    precise = PreciseBatchNorm(num_batches=BATCHES)
    by_epoch = []

    def note(trainer: Any, pl_module: Any) -> None:
        by_epoch.append(values(pl_module, BODY))

    both = [frozen, precise] if freezer_first else [precise, frozen]
    hooked = Hooked(on_validation_epoch_start=note, on_validation_epoch_end=note)
    fit(module, *both, hooked, watch, max_epochs=3, num_sanity_val_steps=0)
    moving_average, recalibrated = by_epoch[2:4]
    statistics = [key for key in recalibrated if key.endswith(("running_mean", "running_var"))]
    assert all(recalibrated[key] != moving_average[key] for key in statistics)
    assert {key: values(module, BODY)[key] for key in statistics} == {key: recalibrated[key] for key in statistics}
    assert [not moved[BODY[0]] for moved in watch.stats] == as_flags(".... .... xxxx")
    assert precise.last is not None
    assert precise.last.layers == (HEAD,)
    assert precise.last.frozen == BODY


def test_the_report_of_a_freeze_that_never_began_claims_no_steps() -> None:
    frozen = BatchNormFreezer("body", root="net", start_epoch=7)
    fit(PretrainedClassifier(), frozen)
    assert frozen.report is not None
    assert frozen.report.steps == 0
