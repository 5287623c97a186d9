"""Frozen per copy of the weights: the live model's values, and those of an average kept beside it."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_bn import PreciseBatchNorm
from tests.averages import EMAWeightAveraging, WeightAveraging
from tests.callbacks.freezing_fits import (
    BATCHES,
    BODY,
    HEAD,
    FrozenByHand,
    Hooked,
    Located,
    PretrainedClassifier,
    adamw,
    fit,
    freezer,
    layers,
    resumed_in_mid_epoch,
    saved,
    state,
    values,
)
from tests.models import BodyAndHead, fill_statistics, seeded

#: Enough updates for an average of equal values to drift by its own rounding.
LONG = 10

freezer_first = pytest.mark.parametrize("freezer_first", [True, False], ids=["freezer first", "averaging first"])
averagings = pytest.mark.parametrize(
    "averaging",
    [
        pytest.param(WeightAveraging, id="WeightAveraging"),
        pytest.param(lambda: EMAWeightAveraging(decay=0.9), id="EMA"),
        pytest.param(lambda: EMAWeightAveraging(decay=0.9, use_buffers=False), id="EMA without buffers"),
        pytest.param(lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=BATCHES + 1), id="EMA from later"),
        pytest.param(
            lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=0, update_starting_at_epoch=1), id="EMA by epoch"
        ),
    ],
)


def ordered(freezer_first: bool, frozen: pl.Callback, *others: pl.Callback) -> list[pl.Callback]:
    return [frozen, *others] if freezer_first else [*others, frozen]


def average_of(averaging: Any) -> nn.Module:
    return averaging._average_model.module


def test_an_average_of_equal_values_drifts_by_its_own_rounding() -> None:
    # Why the average has to be looked after: without the freezer, what it saves is not what was frozen.
    module = FrozenByHand(optimizer=adamw)
    expected = values(module, BODY)
    fit(module, EMAWeightAveraging(decay=0.9), max_epochs=LONG)
    assert values(module, BODY) != expected


@freezer_first
@averagings
def test_frozen_values_are_bit_identical_live_in_the_average_in_validation_and_in_every_checkpoint(
    averaging: Any, freezer_first: bool, tmp_path: Path
) -> None:
    module, frozen, averages, seen = PretrainedClassifier(optimizer=adamw), freezer(), averaging(), []
    expected, head = values(module, BODY), values(module, [HEAD])
    swapped = []

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        seen.append(values(pl_module, BODY))
        swapped.append(values(pl_module, [HEAD]))

    def note_live(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seen.append(values(pl_module, BODY))

    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=10)
    at_end = ModelCheckpoint(tmp_path, "end-{step}", save_top_k=-1, every_n_epochs=5)
    hooked = Hooked(on_validation_batch_start=note, on_train_batch_start=note_live)
    fit(module, *ordered(freezer_first, frozen, averages), hooked, keep, at_end, max_epochs=LONG)
    assert all(one == expected for one in seen)
    assert values(module, BODY) == expected
    assert values(module, [HEAD]) != head
    assert len(set(map(str, swapped))) > LONG // 2
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == BATCHES * LONG // 10 + LONG // 5
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert saved(checkpoint["state_dict"]) == expected, file.name
        assert saved(checkpoint["current_model_state"]) == expected, file.name
    assert frozen.report is not None
    assert frozen.report.identical


@freezer_first
@averagings
def test_a_freeze_beside_an_average_that_is_already_under_way_holds_each_at_its_own_values(
    averaging: Any, freezer_first: bool, tmp_path: Path
) -> None:
    module, frozen, averages = PretrainedClassifier(optimizer=adamw), freezer(start_epoch=2), averaging()
    live: list[dict[str, bytes]] = []
    average: list[dict[str, bytes]] = []
    validated: list[dict[str, bytes]] = []

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > 2 * BATCHES:
            live.append(values(pl_module, BODY))
        if trainer.global_step == 2 * BATCHES:
            average.append(values(average_of(averages), BODY))

    def note_validation(trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if trainer.global_step > 2 * BATCHES:
            validated.append(values(pl_module, BODY))

    hooked = Hooked(on_train_batch_start=note, on_validation_batch_start=note_validation)
    keep = ModelCheckpoint(tmp_path, "last", every_n_epochs=8)
    fit(module, hooked, *ordered(freezer_first, frozen, averages), keep, max_epochs=8)
    assert all(one == live[0] for one in live)
    assert all(one == average[0] for one in validated)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved(checkpoint["current_model_state"]) == live[0]
    assert saved(checkpoint["state_dict"]) == average[0]
    # At the end of a fit WeightAveraging puts the average in the place of the weights.
    assert values(module, BODY) == average[0]
    assert frozen.report is not None
    assert frozen.report.identical


@freezer_first
def test_an_average_that_was_made_before_the_weights_were_loaded_holds_what_was_loaded(freezer_first: bool) -> None:
    class Loading(PretrainedClassifier):
        def on_train_start(self) -> None:
            self.net.load_state_dict(loaded)

    loaded = fill_statistics(seeded(BodyAndHead), seed=5).state_dict()
    module, frozen, averages = Loading(optimizer=adamw), freezer(), EMAWeightAveraging(decay=0.9)
    expected = values(PretrainedClassifier(fill_statistics(seeded(BodyAndHead), seed=5)), BODY)
    fit(module, *ordered(freezer_first, frozen, averages), max_epochs=3)
    assert values(module, BODY) == expected
    assert values(average_of(averages), BODY) == expected
    assert frozen.report is not None
    assert frozen.report.identical


@freezer_first
def test_an_average_whose_freeze_has_ended_averages_again(freezer_first: bool) -> None:
    module, frozen, averages = (
        PretrainedClassifier(optimizer=adamw),
        freezer(stop_epoch=2),
        EMAWeightAveraging(decay=0.5),
    )
    noted: dict[int, dict[str, bytes]] = {}

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        noted[trainer.global_step] = values(average_of(averages), BODY)

    fit(module, Hooked(on_train_batch_start=note), *ordered(freezer_first, frozen, averages), max_epochs=3)
    assert noted[2 * BATCHES] == values(PretrainedClassifier(), BODY)
    assert all(value != noted[2 * BATCHES][key] for key, value in noted[2 * BATCHES + 2].items())


@resumed_in_mid_epoch
@freezer_first
@averagings
def test_a_run_with_averages_resumed_in_mid_epoch_equals_the_uninterrupted_one(
    averaging: Any, freezer_first: bool, tmp_path: Path
) -> None:
    def run(folder: Path, ckpt_path: Path | None = None, **arguments: Any) -> tuple[Any, ...]:
        module, averages = Located(optimizer=adamw), averaging()
        keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=BATCHES + 2)
        frozen = freezer(**arguments)
        fit(module, *ordered(freezer_first, frozen, averages), keep, ckpt_path=ckpt_path, max_epochs=4)
        assert frozen.report is not None
        return state(module), state(average_of(averages)), frozen.report

    for arguments in ({}, {"start_epoch": 1}):
        folder = tmp_path / str(len(arguments))
        whole = run(folder, **arguments)
        resumed = run(folder, folder / f"step={BATCHES + 2}.ckpt", **arguments)
        assert resumed == whole


@freezer_first
def test_stochastic_weight_averaging_is_put_right_and_named(freezer_first: bool) -> None:
    module, frozen = PretrainedClassifier(), freezer()
    expected = values(module, BODY)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    seen = []

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        seen.append(values(pl_module, BODY))

    hooked = Hooked(on_validation_batch_start=note)
    with (
        pytest.warns(UserWarning, match="a frozen value changed and was restored"),
        pytest.warns(UserWarning, match="changed by other code and restored"),
    ):
        fit(module, *ordered(freezer_first, frozen, swa), hooked, max_epochs=3)
    assert all(one == expected for one in seen)
    assert values(module, BODY) == expected
    assert frozen.report is not None
    assert {one.change.value for one in frozen.report.violations} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert all("StochasticWeightAveraging" in violation.change.cause for violation in frozen.report.violations)
    assert all(layer.momentum == 0.1 for layer in layers(module).values())


@freezer_first
def test_frozen_layers_stay_out_of_a_recalibration_of_averaged_weights(freezer_first: bool) -> None:
    module, frozen = PretrainedClassifier(optimizer=adamw), freezer()
    expected = values(module, BODY)
    precise = PreciseBatchNorm(num_batches=2)
    fit(module, *ordered(freezer_first, frozen, precise, EMAWeightAveraging(decay=0.9)), max_epochs=6)
    assert values(module, BODY) == expected
    assert precise.last is not None
    assert precise.last.layers == (HEAD,)
    assert frozen.report is not None
    assert frozen.report.identical


def test_a_write_while_averages_are_swapped_in_is_not_taken_for_the_models_own() -> None:
    # Nothing is healed while averages stand in the place of the weights: the average's values would be "put back".
    module, averages, seen = PretrainedClassifier(optimizer=adamw), EMAWeightAveraging(decay=0.9), []
    frozen = freezer(start_epoch=1)

    def save(trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if trainer.global_step > BATCHES:
            before = values(pl_module)
            trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            seen.append(values(pl_module) == before)

    fit(module, frozen, averages, Hooked(on_validation_batch_start=save), max_epochs=3)
    assert seen
    assert all(seen)
    assert frozen.report is not None
    assert frozen.report.identical


def test_updates_that_are_allowed_reach_the_live_model_beside_an_average() -> None:
    frozen, averages = freezer(), EMAWeightAveraging(decay=0.5)

    class Updating(PretrainedClassifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with frozen.allow_updates():
                    layers(self)[BODY[0]].running_mean.fill_(3.0)

    module, live = Updating(optimizer=adamw), []

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > BATCHES:
            live.append(float(layers(pl_module)[BODY[0]].running_mean.mean()))

    fit(module, frozen, averages, Hooked(on_train_batch_start=note), max_epochs=4)
    assert set(live) == {3.0}
    assert frozen.report is not None
    assert frozen.report.identical
