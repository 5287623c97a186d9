"""What a freezer says of itself: its report, its state in checkpoints, and how it lives beside another one."""

import csv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_bn.functional import is_frozen, layer_status
from tests.callbacks.freezing_fits import (
    BATCHES,
    BODY,
    EPOCHS,
    HEAD,
    Hooked,
    Located,
    PretrainedClassifier,
    Watch,
    adamw,
    fit,
    freezer,
    layers,
    loader,
    modes,
    resumed_in_mid_epoch,
    said,
    saved,
    state,
    trainer_of,
    values,
)

PUT_BACK = "a frozen value changed and was restored"
MOVED_BY_OTHERS = "changed by other code and restored"


def last_kept(folder: Path, **every: int) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, **(every or {"every_n_epochs": 1}))


class Moving(Located):
    """Moves a frozen value in step 3, by two."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == 3:
            layers(self)[BODY[0]].running_mean.add_(2)


# the report


def test_there_is_no_report_before_a_fit_and_none_while_it_runs() -> None:
    frozen, seen = freezer(), []
    assert frozen.report is None
    fit(PretrainedClassifier(), frozen, Hooked(on_train_batch_end=lambda *a: seen.append(frozen.report)))
    fit(PretrainedClassifier(), frozen, Hooked(on_train_batch_end=lambda *a: seen.append(frozen.report)))
    assert seen == [None] * (2 * EPOCHS * BATCHES)


def test_the_report_says_what_was_frozen_for_how_long() -> None:
    frozen = freezer()
    fit(PretrainedClassifier(), frozen)
    assert frozen.report is not None
    assert frozen.report.layers == BODY
    assert frozen.report.steps == EPOCHS * BATCHES
    assert frozen.report.violations == ()
    assert str(frozen.report) == "2 frozen layers bit-identical over 8 steps"


def test_the_report_says_what_moved_when_and_by_how_much() -> None:
    frozen = freezer()
    with pytest.warns(UserWarning, match=PUT_BACK) as caught, pytest.warns(UserWarning, match=MOVED_BY_OTHERS):
        fit(Moving(), frozen)
    assert frozen.report is not None
    (violation,) = frozen.report.violations
    assert (violation.change.layer, violation.change.value) == (BODY[0], "running_mean")
    assert violation.change.largest_change == pytest.approx(2)
    assert violation.step == 4
    assert not frozen.report.identical
    text = "step 4: net.body.1 (running_mean by up to 2)"
    assert text in str(frozen.report)
    assert any(text in str(warning.message) for warning in caught)


def test_a_fit_says_in_one_line_what_it_will_freeze_and_in_one_that_nothing_moved() -> None:
    with said() as lines:
        fit(PretrainedClassifier(), freezer())
    own = [line for line in lines if line.startswith("BatchNormFreezer")]
    assert own == [
        "BatchNormFreezer: 2 of 3 layers frozen (statistics, affine) by body: 2; 4 other weights below these "
        "paths still train",
        "BatchNormFreezer: 2 frozen layers bit-identical over 8 steps",
    ]


def test_what_became_of_the_frozen_values_is_logged(tmp_path: Path) -> None:
    for name, module in (("still", Located()), ("moving", Moving())):
        logger = CSVLogger(tmp_path, name, version="0")
        with pytest.warns(UserWarning, match="restored") if name == "moving" else nullcontext():
            fit(module, freezer(), logger=logger)
        with open(tmp_path / name / "0" / "metrics.csv") as file:
            (row,) = [row for row in csv.DictReader(file) if row["bn/frozen_layers"]]
        assert float(row["bn/frozen_layers"]) == 2
        assert float(row["bn/frozen_violations"]) == (name == "moving")
        assert int(row["step"]) == EPOCHS * BATCHES


def test_the_report_after_an_exception_is_of_the_steps_until_then() -> None:
    class Failing(PretrainedClassifier):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 3:
                raise RuntimeError("as planned")

    frozen = freezer()
    with pytest.raises(RuntimeError, match="as planned"):
        fit(Failing(), frozen)
    assert frozen.report is not None
    assert frozen.report.steps == 3


# the state


def test_the_state_in_a_checkpoint_is_plain_and_small(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=PUT_BACK), pytest.warns(UserWarning, match=MOVED_BY_OTHERS):
        fit(Moving(), freezer(start_step=1, name="backbone"), last_kept(tmp_path))
    checkpoint = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    own = checkpoint["callbacks"]["BatchNormFreezer[backbone]"]

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(of) for key, of in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)

    assert plain(own)
    assert (own["format"], own["report"]["format"]) == (1, 1)
    assert own["report"]["steps"] == 7
    assert own["report"]["layers"] == list(BODY)
    assert [(one["layer"], one["value"], one["step"]) for one in own["report"]["violations"]] == [
        (BODY[0], "running_mean", 4)
    ]


def test_a_checkpoint_tells_of_a_move_that_was_found_while_it_was_written(tmp_path: Path) -> None:
    class Late(PretrainedClassifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 2:
                mean = layers(self)[BODY[0]].running_mean
                mean.data.copy_(mean.data + 2)  # leaves no version behind: only a comparison finds it

    with pytest.warns(UserWarning, match=PUT_BACK), pytest.warns(UserWarning, match=MOVED_BY_OTHERS):
        fit(Late(), freezer(), last_kept(tmp_path, every_n_train_steps=3))
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert saved(checkpoint["state_dict"]) == values(PretrainedClassifier(), BODY)
    (moved,) = checkpoint["callbacks"]["BatchNormFreezer"]["report"]["violations"]
    assert (moved["layer"], moved["value"]) == (BODY[0], "running_mean")


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda own: own.pop(key)


def with_more(own: dict[str, Any]) -> None:
    own.update({"format": 2, "color": "red"})
    own["settings"]["color"] = own["report"]["color"] = "red"


def without_a_setting(own: dict[str, Any]) -> None:
    del own["settings"]["by_task"]


@resumed_in_mid_epoch
@pytest.mark.parametrize(
    ("alter", "before"),
    [
        (without("format"), 6),
        (without("settings"), 6),
        (without("report"), 0),
        (with_more, 6),
        (without_a_setting, 6),
        (dict.clear, 0),
    ],
    ids=["format", "settings", "report", "with more", "without a setting", "empty"],
)
def test_a_state_with_more_or_less_in_it_is_read_as_far_as_it_is_known(
    alter: Callable[[dict[str, Any]], None], before: int, tmp_path: Path
) -> None:
    fit(Located(), freezer(), last_kept(tmp_path, every_n_train_steps=6))
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    alter(checkpoint["callbacks"]["BatchNormFreezer"])
    torch.save(checkpoint, tmp_path / "altered.ckpt")
    resumed = freezer()
    fit(Located(), resumed, ckpt_path=tmp_path / "altered.ckpt", max_epochs=3)
    assert resumed.report is not None
    assert resumed.report.identical
    assert resumed.report.steps == before + 3 * BATCHES - 6


@resumed_in_mid_epoch
def test_steps_and_moves_are_counted_across_a_resume(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=PUT_BACK), pytest.warns(UserWarning, match=MOVED_BY_OTHERS):
        fit(Moving(), freezer(), last_kept(tmp_path, every_n_train_steps=6))
    resumed = freezer()
    with pytest.warns(UserWarning, match=MOVED_BY_OTHERS):
        fit(Located(), resumed, ckpt_path=tmp_path / "step=6.ckpt", max_epochs=3)
    assert resumed.report is not None
    assert resumed.report.steps == 3 * BATCHES
    (violation,) = resumed.report.violations
    assert (violation.change.layer, violation.step) == (BODY[0], 4)


def test_what_validate_read_from_a_checkpoint_is_not_counted_in_a_later_fit(tmp_path: Path) -> None:
    fit(PretrainedClassifier(), freezer(), last_kept(tmp_path))
    module, frozen = PretrainedClassifier(), freezer()
    trainer = trainer_of(frozen)
    trainer.validate(module, loader(16, seed=1), ckpt_path=tmp_path / "step=8.ckpt", verbose=False)
    fit(module, frozen)
    assert frozen.report is not None
    assert frozen.report.steps == EPOCHS * BATCHES


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"modules": "head"}, r"modules 'body' -> 'head'"),
        ({"affine": False}, r"affine True -> False"),
        ({"start_epoch": 1}, r"schedule 'always' -> 'from epoch 1'"),
        ({"exclude": "body.4"}, r"exclude None -> 'body\.4'"),
    ],
)
def test_a_checkpoint_of_another_plan_is_noticed_and_the_run_freezes_as_configured_now(
    now: dict[str, Any], named: str, tmp_path: Path
) -> None:
    fit(Located(), freezer(), last_kept(tmp_path))
    module, watch, frozen = Located(), Watch(), freezer(**now)
    with pytest.warns(UserWarning, match=rf"written under another plan \(.*{named}.*as it is configured now"):
        fit(module, watch, frozen, ckpt_path=tmp_path / "step=8.ckpt", max_epochs=3)
    expected = {"modules": (HEAD,), "exclude": BODY[:1]}.get(next(iter(now)), BODY)
    assert all(tuple(name for name, moves in moved.items() if not moves) == expected for moved in watch.stats)
    assert frozen.report is not None
    assert frozen.report.layers == expected


def test_the_same_plan_written_in_another_way_is_not_another_plan(tmp_path: Path) -> None:
    fit(Located(), freezer(modules=("body", "head")), last_kept(tmp_path))
    fit(Located(), freezer(modules=["body", "head"]), ckpt_path=tmp_path / "step=8.ckpt", max_epochs=3)


def test_a_checkpoint_of_another_name_is_noticed_and_counting_starts_anew(tmp_path: Path) -> None:
    fit(Located(), freezer(name="backbone"), last_kept(tmp_path))
    frozen = freezer(name="vfe")
    with (
        pytest.warns(UserWarning, match=r"written with 'BatchNormFreezer\[backbone\]'.*'BatchNormFreezer\[vfe\]'"),
        pytest.warns(UserWarning, match="contains callbacks which are missing|`ckpt_path`, callbacks used"),
    ):
        fit(Located(), frozen, ckpt_path=tmp_path / "step=8.ckpt", max_epochs=3)
    assert frozen.report is not None
    assert frozen.report.steps == BATCHES


def test_a_checkpoint_of_a_run_without_a_freezer_is_taken_in_silence(tmp_path: Path) -> None:
    fit(Located(), last_kept(tmp_path))
    module, frozen = Located(), freezer()
    fit(module, frozen, ckpt_path=tmp_path / "step=8.ckpt", max_epochs=3)
    checkpoint = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert values(module, BODY) == saved(checkpoint["state_dict"])
    assert frozen.report is not None
    assert frozen.report.steps == BATCHES


def test_a_checkpoint_of_a_frozen_run_loads_where_there_is_no_freezer(tmp_path: Path) -> None:
    module = Located()
    fit(module, freezer(), last_kept(tmp_path))
    loaded = Located.load_from_checkpoint(tmp_path / "step=8.ckpt", weights_only=True)
    assert state(loaded) == state(module)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        fit(loaded, ckpt_path=tmp_path / "step=8.ckpt", max_epochs=3)
    assert all(values(loaded, BODY)[key] != value for key, value in values(module, BODY).items())


# two of them


def test_two_freezers_of_one_name_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"two BatchNormFreezer callbacks have the name None.*name="):
        fit(PretrainedClassifier(), freezer(), freezer(modules="head"))


@pytest.mark.parametrize("name", [None, "backbone"])
def test_two_freezers_of_one_name_are_refused_where_the_module_brings_one(name: str | None) -> None:
    class Bringing(PretrainedClassifier):
        def configure_callbacks(self) -> Any:
            return [freezer(name=name), freezer(modules="head", name=name)]

    with pytest.raises(MisconfigurationException, match=rf"two BatchNormFreezer callbacks.*{name!r}.*name="):
        fit(Bringing())


def test_two_freezers_of_different_names_keep_states_of_their_own(tmp_path: Path) -> None:
    module, watch = Located(), Watch()
    body, head = freezer(name="body"), freezer(modules="head", affine=False, stop_epoch=1, name="head")
    fit(module, watch, body, head, last_kept(tmp_path))
    assert (body.report.layers, body.report.steps) == (BODY, 8)  # type: ignore[union-attr]
    assert (head.report.layers, head.report.steps) == ((HEAD,), 4)  # type: ignore[union-attr]
    states = torch.load(tmp_path / "step=8.ckpt", weights_only=True)["callbacks"]
    assert {"BatchNormFreezer[body]", "BatchNormFreezer[head]"} <= set(states)
    assert [not moved[HEAD] for moved in watch.stats] == [True] * BATCHES + [False] * BATCHES


@pytest.mark.parametrize("interval", [1.0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_two_freezers_hold_stays_frozen_until_both_release_it(first: bool, interval: float) -> None:
    module, watch = PretrainedClassifier(optimizer=adamw), Watch()
    both = [freezer(name="short", stop_step=3), freezer(modules="body.1", name="long", stop_epoch=2)]
    held_by: list[tuple[str, ...]] = []

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        held_by.append(layer_status(layers(pl_module)[BODY[0]]).stats_frozen_by)

    callbacks = both if first else both[::-1]
    fit(module, watch, *callbacks, Hooked(on_train_batch_start=note), max_epochs=3, val_check_interval=interval)
    for noted in (watch.stats, watch.affine):
        assert [not moved[BODY[0]] for moved in noted] == [True] * 8 + [False] * 4
        assert [not moved[BODY[1]] for moved in noted] == [True] * 3 + [False] * 9
    assert [len(holders) for holders in held_by] == [2] * 3 + [1] * 5 + [0] * 4
    assert all(one.report is not None and one.report.identical for one in both)
    assert modes(module) == modes(PretrainedClassifier())
    assert not any(is_frozen(layer) for layer in layers(module).values())


def test_one_freezer_for_statistics_and_one_for_affine_are_one_for_both() -> None:
    module, together = PretrainedClassifier(optimizer=adamw), PretrainedClassifier(optimizer=adamw)
    fit(module, freezer(affine=False, name="statistics"), freezer(stats=False, name="affine"))
    fit(together, freezer())
    assert state(module) == state(together)
