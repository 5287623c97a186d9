"""The monitor in real fits: what is logged, what it refers to, when it acts, what a checkpoint keeps."""

import json
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from wandb.proto import wandb_internal_pb2

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm
from lightning_bn.callbacks.monitor import BatchNormDriftError
from lightning_bn.functional import take_snapshot
from lightning_bn.functional.statistics.drift_measures import drift
from tests.callbacks.fits import Classifier, Net, quiet, samples, train_loader, trajectory, val_loader
from tests.callbacks.monitoring_fits import TamperedClassifier, csv_rows, fit, monitor, norms, pretrained, warned
from tests.models import bits, seeded
from tests.versions import skip_without

KEYS = {"bn/jeffreys_mean", "bn/jeffreys_max"}
CURVES = {*KEYS, "bn/jeffreys_p95", "bn/collapsed_channels"}


def module(lr: float = 0.01, fault: Any = None) -> TamperedClassifier:
    return TamperedClassifier(pretrained(), fault, lr=lr)


def shifted_from(step: int, by: float = 5.0) -> Any:
    return lambda x, now: x + by if now >= step else x


class Seen(pl.Callback):
    """The statistics as every training batch ends, and what could be monitored when checkpoints are saved."""

    def __init__(self) -> None:
        self.snapshots: dict[int, Any] = {}
        self.at_validation_end: list[set[str]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.snapshots[trainer.global_step] = take_snapshot(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.snapshots[trainer.global_step] = take_snapshot(pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.at_validation_end.append({key for key in trainer.callback_metrics if key.startswith("bn/")})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"every_n_steps": 0}, r"every_n_steps=0.*whole number, 1 or more"),
        ({"warn_above": 2.0, "act_above": 1.0}, r"warn_above=2.*above act_above=1"),
        ({"every_n_steps": True}, r"every_n_steps=True"),
        ({"log_worst": "1"}, r"log_worst='1'.*whole number"),
        ({"reference": None}, r"reference=None.*fit_start"),
        ({"reference": ""}, r"reference=''.*no such file"),
        ({"reference": "/none"}, r"reference='/none'.*no such file"),
        ({"log_worst": -1}, r"log_worst=-1"),
        ({"warn_above": 0.0}, r"warn_above=0.0.*positive"),
        ({"act_above": float("nan")}, r"act_above=nan.*positive"),
        ({"measure": "jefreys"}, r"measure='jefreys'.*jeffreys"),
        ({"action": "explode"}, r"action='explode'.*warn, stop, raise"),
        ({"reference": "nowhere.ckpt"}, r"reference='nowhere.ckpt'.*fit_start.*no such file"),
    ],
)
def test_arguments_out_of_range_name_the_value_and_the_way_out(arguments: Any, said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        BatchNormMonitor(**arguments)


def test_two_monitors_with_prefixes_of_their_own_work_side_by_side() -> None:
    a, b = (
        monitor(name="head", prefix="head", modules="net.head"),
        monitor(name="body", prefix="body", exclude="net.head"),
    )
    trainer = quiet(callbacks=[a, b], max_epochs=1)
    trainer.fit(module(), train_loader(), val_loader())
    assert {"head/jeffreys_max", "body/jeffreys_max"} <= set(trainer.callback_metrics)
    assert a.history.names == ("net.head.1",)
    assert b.history.names == ("net.features.1", "net.bn")


def test_two_monitors_of_one_name_are_refused() -> None:
    trainer = quiet(callbacks=[monitor()], max_epochs=1)
    trainer.callbacks.append(monitor(measure="hellinger"))
    with pytest.raises(MisconfigurationException, match="give each a different name="):
        trainer.fit(module(), train_loader(), val_loader())
    assert monitor(name="a").state_key == "BatchNormMonitor[a]"


# --- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["jeffreys", "mean_shift"])
def test_history_is_the_drift_from_fit_start_at_every_sample(measure: Any) -> None:
    watching, seen = monitor(measure=measure), Seen()
    fit(module(), watching, seen, max_epochs=1, count=64)
    history = watching.history
    assert history.names == ("net.features.1", "net.bn", "net.head.1")
    assert history.steps == list(range(1, 9))
    assert history.epochs == [0] * 8
    for row, step in zip(history.values(), history.steps, strict=True):
        expected = [float(v.abs().max()) for v in drift(seen.snapshots[0], seen.snapshots[step], measure).values()]
        assert row.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_previous_epoch_measures_from_the_start_of_the_epoch() -> None:
    watching, seen = monitor(reference="previous_epoch"), Seen()
    fit(module(), watching, seen, max_epochs=3, count=32)
    for row, step in zip(watching.history.values(), watching.history.steps, strict=True):
        start = (step - 1) // 4 * 4
        expected = [float(v.max()) for v in drift(seen.snapshots[start], seen.snapshots[step]).values()]
        assert row.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("precise_first", [True, False])
def test_recalibrated_measures_from_what_the_last_recalibration_wrote(restore: bool, precise_first: bool) -> None:
    watching, seen, precise = monitor(reference="recalibrated"), Seen(), PreciseBatchNorm(4, restore=restore)
    written: dict[int, Any] = {}

    class Note(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if precise.last is not None:
                written[trainer.global_step] = take_snapshot(pl_module)

    callbacks = [precise, watching] if precise_first else [watching, precise]
    fit(module(), *callbacks, seen, Note(), max_epochs=3, count=64)
    assert list(written) == [8, 16, 24]
    rows = dict(zip(watching.history.steps, watching.history.values(), strict=True))
    for step in (1, 8, 9, 12, 16, 17, 24):
        # The sample at step 8 was taken before the recalibration there.
        reference = seen.snapshots[0] if step <= 8 else written[(step - 1) // 8 * 8]
        expected = [float(v.max()) for v in drift(reference, seen.snapshots[step]).values()]
        assert rows[step].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-15), step


def test_training_statistics_are_measured_before_a_recalibration_replaces_them() -> None:
    watching, seen = monitor(every_n_steps=1000), Seen()
    fit(module(), PreciseBatchNorm(4), watching, seen, max_epochs=1, count=64)
    assert watching.history.steps == [8]
    expected = [float(v.max()) for v in drift(seen.snapshots[0], seen.snapshots[8]).values()]
    assert watching.history.values()[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_layers_that_start_untrained_have_no_drift_until_they_are_settled_and_others_do() -> None:
    net = pretrained()
    net.head[1].reset_running_stats()  # type: ignore[index, union-attr]
    watching = monitor()
    fit(TamperedClassifier(net), watching, max_epochs=2)
    values = watching.history.values()
    assert (values[:, :2] > 0).all()
    # (1 - 0.1)^44 is the first below 1 %.
    assert (values[:43, 2] == 0).all()
    assert (values[45:, 2] > 0).all()


@pytest.mark.parametrize("reference", ["previous_epoch", "recalibrated"])
def test_a_reference_that_moves_does_not_make_untrained_layers_settled(reference: str) -> None:
    watching = monitor(reference=reference)
    fit(TamperedClassifier(seeded(Net)), watching, PreciseBatchNorm(2, restore=True), max_epochs=5, count=8 * 16)
    settled = [step >= 45 for step in watching.history.steps]
    drifts = watching.history.values().max(1).values.tolist()
    assert not any(drift for drift, known in zip(drifts, settled, strict=True) if not known)
    assert any(drift for drift, known in zip(drifts, settled, strict=True) if known)


def test_pretrained_statistics_without_a_counter_are_no_untrained_ones() -> None:
    # Checkpoints of old know no num_batches_tracked: it is 0 after loading.
    net = pretrained()
    for layer in norms(net):
        layer.num_batches_tracked.zero_()  # type: ignore[union-attr, operator]
    watching = monitor()
    fit(TamperedClassifier(net), watching, max_epochs=1, count=32)
    assert (watching.history.values() > 0).all()


# --- a checkpoint as the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [True, False])
def test_a_checkpoint_is_measured_from(tmp_path: Path, bare: bool) -> None:
    there = module()
    path = tmp_path / "reference.ckpt"
    torch.save(there.state_dict() if bare else {"state_dict": there.state_dict()}, path)
    then = take_snapshot(there)
    here = module()
    for layer in norms(here):
        layer.running_mean.add_(1.0)  # type: ignore[union-attr]
    watching, seen = monitor(reference=str(path)), Seen()
    fit(here, watching, seen, max_epochs=1, count=16)
    expected = [float(v.max()) for v in drift(then, seen.snapshots[2]).values()]
    assert watching.history.values()[-1].tolist() == pytest.approx(expected, rel=1e-6)


def test_untrained_layers_too_are_measured_from_a_checkpoint(tmp_path: Path) -> None:
    trained = TamperedClassifier(pretrained())
    torch.save(trained.state_dict(), tmp_path / "reference.ckpt")
    watching = monitor(reference=str(tmp_path / "reference.ckpt"))
    scratch, seen = TamperedClassifier(seeded(Net), lr=1e-3), Seen()
    fit(scratch, watching, seen, max_epochs=3)
    values = watching.history.values()
    assert float(values[:40].max()) == 0
    expected = drift(take_snapshot(trained), seen.snapshots[96])
    assert values[-1].tolist() == pytest.approx([float(one.max()) for one in expected.values()], rel=1e-6)


def test_a_checkpoint_of_another_model_names_the_layers(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": torch.nn.BatchNorm1d(3).state_dict()}, path)
    with pytest.raises(ValueError, match=r"other\.ckpt does not fit.*lacks 'net\.features\.1.*another model"):
        fit(module(), monitor(reference=str(path)), max_epochs=1)


def bare(net: nn.Module) -> dict[str, Any]:
    return net.state_dict()


def in_data_parallel(net: nn.Module) -> dict[str, Any]:
    return nn.DataParallel(net).state_dict()


def in_another_module(net: nn.Module) -> dict[str, Any]:
    return {"model": nn.ModuleDict({"encoder": net}).state_dict(), "epoch": 3}


@pytest.mark.parametrize("form", [bare, in_data_parallel, in_another_module])
def test_reference_may_be_a_file_of_the_network_alone_and_that_is_said(
    form: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, path = module(), tmp_path / "backbone.pt"
    torch.save(form(there.net), path)
    here = module()
    for layer in norms(here):
        layer.running_mean.add_(1.0)  # type: ignore[union-attr]
    watching, seen = monitor(reference=str(path)), Seen()
    with caplog.at_level(logging.INFO):
        fit(here, watching, seen, max_epochs=1, count=16)
    expected = [float(v.max()) for v in drift(take_snapshot(there), seen.snapshots[2]).values()]
    assert watching.history.values()[-1].tolist() == pytest.approx(expected, rel=1e-6)
    assert "reference backbone.pt: " in caplog.text
    assert "'net.features.1.running_mean' read from " in caplog.text


def test_reference_with_two_fitting_networks_is_an_error_that_names_them(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    torch.save(nn.ModuleDict({"student": module().net, "teacher": module().net}).state_dict(), path)
    with pytest.raises(ValueError, match=r"two\.pt does not fit.*prefix='student\.'.*prefix='teacher\.'"):
        fit(module(), monitor(reference=str(path)), max_epochs=1)


def test_reference_that_is_a_folder_is_an_error_that_says_how_to_make_a_file_of_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint"):
        fit(module(), monitor(reference=str(tmp_path)), max_epochs=1)
    (tmp_path / ".metadata").touch()  # as torch.distributed.checkpoint leaves it beside the parts
    with pytest.raises(IsADirectoryError, match=r"is a checkpoint in many parts.*dcp_to_torch"):
        fit(module(), monitor(reference=str(tmp_path)), max_epochs=1)


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": module().state_dict(), "x": Payload(str(tmp_path / "executed"))}, path)
    with pytest.raises(Exception, match=r"evil\.ckpt holds objects besides tensors"):
        fit(module(), monitor(reference=str(path)), max_epochs=1)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_has_gone_since_is_an_error_before_training(tmp_path: Path) -> None:
    path = tmp_path / "reference.ckpt"
    torch.save(module().state_dict(), path)
    watching = monitor(reference=str(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"reference\.ckpt"):
        fit(module(), watching, max_epochs=1)


class Bars(pl.Callback):
    """What the progress bar shows after every training batch and at the end."""

    def __init__(self) -> None:
        self.shown: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.shown.append(trainer.progress_bar_metrics.get("bn/jeffreys_max"))

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.shown.append({key for key in trainer.progress_bar_metrics if "bn/" in key})


@pytest.mark.parametrize("validate", [True, False])
def test_the_largest_drift_is_in_the_progress_bar_on_request(validate: bool) -> None:
    watching, bars = monitor(every_n_steps=2, prog_bar=True), Bars()
    fit(module(), watching, bars, max_epochs=2, count=32, validate=validate)
    *steps, names = bars.shown
    assert names == {"bn/jeffreys_max"}
    largest = dict(zip(watching.history.steps, watching.history.values().amax(1).tolist(), strict=True))
    assert steps[0] is None
    assert steps[1:4] == pytest.approx([largest[2], largest[2], largest[4]])
    bars = Bars()
    fit(module(), monitor(), bars, max_epochs=1, count=32, validate=validate)
    assert bars.shown == [None] * 4 + [set()]


# --- logging -------------------------------------------------------------------------------------------------------


def test_curves_are_in_the_csv_file_at_every_sample_under_fixed_keys(tmp_path: Path) -> None:
    logger, watching = CSVLogger(tmp_path), monitor(every_n_steps=2, log_worst=2)
    fit(module(), watching, logger=logger, max_epochs=2, count=56)
    rows = csv_rows(logger)
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 7, 8, 10, 12, 14] == watching.history.steps
    keys = {key for key in rows[0] if key.startswith("bn/")}
    assert keys == {*CURVES, "bn/jeffreys_worst_1", "bn/jeffreys_worst_2"}
    for row, values in zip(rows, watching.history.values(), strict=True):
        assert all(row[key] for key in keys)
        worst = sorted(values.tolist(), reverse=True)
        assert float(row["bn/jeffreys_max"]) == pytest.approx(worst[0])
        assert [float(row[f"bn/jeffreys_worst_{rank}"]) for rank in (1, 2)] == pytest.approx(worst[:2])


def test_curves_and_the_figure_are_in_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(module(), monitor(report=True), logger=logger, max_epochs=1, count=32)
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    assert {key for key in found.Tags()["scalars"] if key.startswith("bn/")} == CURVES
    assert [event.step for event in found.Scalars("bn/jeffreys_max")] == [1, 2, 3, 4]
    assert found.Tags()["images"] == ["bn_jeffreys_drift"]
    assert (Path(logger.log_dir) / "bn_jeffreys_drift.png").stat().st_size > 1000


def test_curves_and_the_figure_are_in_weights_and_biases(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="test", settings=wandb.Settings(silent=True))
    watching = monitor(report=True, warn_above=100.0, log_worst=1)
    try:
        fit(module(), watching, logger=logger, max_epochs=1, count=32)
    finally:
        logger.experiment.finish()
        wandb.teardown()
    rows = [row for row in wandb_rows(tmp_path) if "bn/jeffreys_max" in row]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3, 4]
    assert all({*CURVES, "bn/jeffreys_share_above", "bn/jeffreys_worst_1"} <= set(row) for row in rows)
    for row, values in zip(rows, watching.history.values(), strict=True):
        assert row["bn/jeffreys_max"] == row["bn/jeffreys_worst_1"] == pytest.approx(float(values.max()))
    [image] = [row for row in wandb_rows(tmp_path) if "bn_jeffreys_drift/_type" in row]
    assert (image["bn_jeffreys_drift/_type"], image["trainer/global_step"]) == ("images/separated", 4)
    [file] = tmp_path.rglob("media/images/bn_jeffreys_drift_*.png")
    assert file.read_bytes() == next(tmp_path.glob("test/*/bn_jeffreys_drift.png")).read_bytes()


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB; checksum, length and kind before each piece."""
    log, at, whole = b"\0" * 7 + log, 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """What an offline run wrote, one dict for each time something was logged."""
    [path] = folder.rglob("*.wandb")
    rows = []
    for data in leveldb_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_the_share_above_the_threshold_is_a_curve_where_there_is_one(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    watching, seen = monitor(act_above=0.01), Seen()
    fit(module(), watching, seen, logger=logger, max_epochs=1, count=64)
    shares = [float(row["bn/jeffreys_share_above"]) for row in csv_rows(logger)]
    for share, step in zip(shares, watching.history.steps, strict=True):
        values = torch.cat(list(drift(seen.snapshots[0], seen.snapshots[step]).values()))
        assert share == pytest.approx(float((values > 0.01).double().mean()))
    assert min(shares) < max(shares)


def test_more_worst_layers_than_there_are_keep_the_keys(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(module(), monitor(log_worst=5), logger=logger, max_epochs=1, count=16)
    assert float(csv_rows(logger)[-1]["bn/jeffreys_worst_5"]) == 0


def test_the_prefix_and_the_measure_are_in_every_key(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = quiet(callbacks=[monitor(prefix="norm", measure="hellinger")], logger=logger, max_epochs=1)
    trainer.fit(module(), train_loader(), val_loader())
    assert {"norm/hellinger_mean", "norm/hellinger_max"} <= set(trainer.callback_metrics)
    assert not [key for key in trainer.callback_metrics if key.startswith("bn/")]


SCHEDULES: list[dict[str, Any]] = [
    {"val_check_interval": 1.0},
    {"val_check_interval": 0.5},
    {"check_val_every_n_epoch": 2},
    {"check_val_every_n_epoch": None, "val_check_interval": 6},
    {"validate": False},
    {"limit_val_batches": 0},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_checkpoints_and_early_stopping_can_monitor_it_under_every_schedule(
    tmp_path: Path, schedule: dict[str, Any]
) -> None:
    saving = ModelCheckpoint(tmp_path, monitor="bn/jeffreys_max", mode="min", save_top_k=-1)
    stopping = EarlyStopping("bn/jeffreys_mean", divergence_threshold=1e9, patience=100)
    seen, watching = Seen(), monitor(every_n_steps=3)
    fit(module(), watching, saving, stopping, seen, enable_checkpointing=True, max_epochs=2, count=64, **schedule)
    assert saving.best_k_models
    assert stopping.best_score.isfinite()
    assert all(keys == KEYS for keys in seen.at_validation_end)
    by_step = dict(zip(watching.history.steps, watching.history.values().amax(1).tolist(), strict=True))
    for path, value in saving.best_k_models.items():
        step = int(path.rpartition("step=")[2].split(".")[0].split("-")[0])
        assert float(value) == pytest.approx(by_step[step], rel=1e-5)


def test_early_stopping_with_a_divergence_threshold_stops_on_drift() -> None:
    stopping = EarlyStopping("bn/jeffreys_max", divergence_threshold=2.0, patience=100)
    trainer = quiet(callbacks=[monitor(), stopping], max_epochs=10)
    warned(lambda: trainer.fit(module(1e-3, shifted_from(4)), train_loader(), val_loader()))
    assert trainer.current_epoch < 8


def test_early_stopping_by_its_defaults_ends_a_run_whose_drift_rises() -> None:
    epochs = []
    for stop in (
        EarlyStopping("bn/jeffreys_max"),
        EarlyStopping("bn/jeffreys_max", divergence_threshold=50.0, patience=1_000_000),
    ):
        watching = monitor()
        pl.seed_everything(3, verbose=False)
        trainer = quiet(callbacks=[watching, stop], max_epochs=8)
        trainer.fit(module(lr=0.02), train_loader(), val_loader())
        epochs.append(trainer.current_epoch)
    assert epochs == [4, 8]


def test_several_validation_loaders_change_nothing() -> None:
    trainer = quiet(callbacks=[monitor()], max_epochs=1)
    trainer.fit(module(), train_loader(), [val_loader(), val_loader()])
    assert {key for key in trainer.callback_metrics if key.startswith("bn/")} == KEYS


def test_the_sanity_check_is_passed_over_in_silence() -> None:
    watching, seen = monitor(), []

    class AfterSanity(pl.Callback):
        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((len(watching.history), [key for key in trainer.callback_metrics if "bn/" in key]))

    fit(module(), watching, AfterSanity(), max_epochs=1, count=16, num_sanity_val_steps=1)
    assert seen == [(0, [])]
    assert watching.history.steps == [1, 2]


def test_barebones_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    watching = monitor(report=True, warn_above=1e-9)
    trainer = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[watching])
    assert warned(lambda: trainer.fit(module(), train_loader(), val_loader())) == []
    assert len(watching.history) == 0
    assert "BatchNorm layer" not in capsys.readouterr().out


def test_validation_outside_of_a_fit_is_left_alone() -> None:
    watching = monitor()
    trainer = quiet(callbacks=[watching])
    trainer.validate(module(), val_loader(), verbose=False)

    assert len(watching.history) == 0


def test_fast_dev_run_passes() -> None:
    watching = monitor()
    fit(module(), watching, fast_dev_run=True)
    assert watching.history.steps == [1]


def test_table_and_figure_can_be_had_during_a_fit_and_after_it() -> None:
    watching = monitor()
    seen: list[list[Any]] = []

    class Asking(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append([list(watching.table(pl_module).cells("history")), watching.figure()])

    net = module()
    fit(net, watching, Asking(), max_epochs=1, count=32)
    assert len(seen) == 4
    assert sorted(seen[0][0]) == ["net.bn", "net.features.1", "net.head.1"]
    assert list(watching.table(net, most=1).cells("history")) == [seen[-1][0][0]]
    assert len(watching.figure().axes[0].get_yticklabels()) == 3


def test_the_table_says_what_training_did_also_after_eval() -> None:
    watching, net = monitor(), module()
    fit(net, watching, max_epochs=1, count=32)
    assert [*watching.table(net.eval()).cells("trains with").values()] == ["batch"] * 3


def test_layers_that_are_not_measured_yet_are_said_not_to_be(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    watching = monitor(report=True)
    with caplog.at_level("INFO"):
        fit(TamperedClassifier(seeded(Net)), watching, max_epochs=1, count=8 * 40)
    assert "running statistics: 3 layers are still warming up and not measured yet" in caplog.text
    assert "did not move" not in caplog.text
    assert "the worst first" in capsys.readouterr().out
    table = watching.table(module())
    assert [*table.cells("jeffreys").values()] == ["not yet"] * 3


def test_drift_of_layers_that_started_untrained_is_said_to_be_since_they_were_measured(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    watching = monitor(every_n_steps=5)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    with caplog.at_level("INFO"):
        fit(
            TamperedClassifier(seeded(Net)), watching, checkpoint, max_epochs=1, count=8 * 64, enable_checkpointing=True
        )
    assert "since step 45, warming up before" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(
            TamperedClassifier(seeded(Net)),
            monitor(every_n_steps=5),
            max_epochs=2,
            count=8 * 64,
            ckpt_path=tmp_path / "last.ckpt",
        )
    assert "since step 45, warming up before" in caplog.text


def test_raising_shows_table_and_figure_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.raises(BatchNormDriftError, match="in two samples in a row"):
        fit(
            module(fault=shifted_from(5, 20.0)),
            monitor(act_above=0.5, action="raise", report=True),
            logger=logger,
            max_epochs=1,
        )
    assert "the worst first" in capsys.readouterr().out
    assert (Path(logger.log_dir) / "bn_jeffreys_drift.png").stat().st_size > 1000


def test_without_a_sample_there_is_no_table() -> None:
    with pytest.raises(RuntimeError, match="no sample yet"):
        monitor().table(module())


def test_the_table_is_printed_once_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    fit(module(), monitor(report=True), max_epochs=2, count=32)
    text = capsys.readouterr().out
    assert text.count("Running statistics of 3 BatchNorm layers, the worst first (jeffreys)") == 1


def test_the_table_says_first_what_to_do_and_nothing_where_there_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    watching, net = monitor(report=True, warn_above=0.5), module(fault=shifted_from(5, 20.0))
    said = fit(net, watching, max_epochs=1)
    title, to_do, layers = capsys.readouterr().out.split("\n\n")[:3]
    assert "the worst first" in title
    assert to_do.startswith("What to do:\n- step 6: ")
    assert "layer" in layers.split()[:10]
    words = " ".join(to_do.split())
    assert len(said) > 1
    assert all(line.removeprefix("BatchNormMonitor: ") in words for line in said)
    fit(module(), monitor(report=True), max_epochs=1)
    assert "What to do" not in capsys.readouterr().out


def test_the_figure_says_which_layers_are_frozen_from_the_start() -> None:
    watching, freezer = monitor(), BatchNormFreezer(["features", "bn"], root="net")
    fit(module(), watching, freezer, max_epochs=2, count=32)
    assert watching.history.marks == [(0, name, "frozen from the start") for name in ("net.features.1", "net.bn")]
    [legend] = watching.figure().legends
    assert [text.get_text() for text in legend.get_texts()] == ["frozen from the start"]
    watching, later = monitor(), BatchNormFreezer(["features"], root="net", start_epoch=1)
    fit(module(), watching, later, max_epochs=2, count=32)
    assert [(name, event) for _, name, event in watching.history.marks] == [("net.features.1", "frozen")]


# --- training is not disturbed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 0.5}], ids=str)
def test_training_is_bit_identical_with_and_without(options: dict[str, Any]) -> None:
    def data() -> dict[str, Any]:
        return {"train_dataloaders": train_loader(), "val_dataloaders": val_loader()}

    plain = trajectory(Classifier, data, **options)
    runs: list[Any] = []
    warned(lambda: runs.append(trajectory(Classifier, data, monitor(warn_above=0.1, log_worst=2), **options)))
    [watched] = runs
    assert watched[0] == plain[0]
    assert watched[1] == plain[1]
    assert [bits(b) for b in watched[2].buffers()] == [bits(b) for b in plain[2].buffers()]


# --- acting --------------------------------------------------------------------------------------------------------


def test_stop_ends_training_after_the_second_sample_above() -> None:
    trainer = quiet(callbacks=[monitor(act_above=0.5, action="stop")], max_epochs=3)
    said = warned(lambda: trainer.fit(module(1e-5, shifted_from(5, 20.0)), train_loader(samples(256)), val_loader()))
    [line] = [line for line in said if "training stops" in line]
    assert "is above act_above=0.5" in line
    assert 5 < trainer.global_step <= 8
    assert f"step {trainer.global_step}:" in line


def test_raise_names_layer_step_and_threshold() -> None:
    with pytest.raises(
        BatchNormDriftError,
        match=r"step \d+: net\.\S+ moved .*: new variance \S+ times the old one, mean \S+ sigma.*act_above=0\.5",
    ):
        fit(module(1e-5, shifted_from(5, 20.0)), monitor(act_above=0.5, action="raise"))


def test_statistics_that_are_not_finite_are_above_every_threshold() -> None:
    trainer = quiet(callbacks=[monitor(act_above=1e6, action="stop")], max_epochs=1)
    fault = lambda x, step: x * torch.inf if step == 3 else x  # noqa: E731
    warned(lambda: trainer.fit(module(1e-3, fault), train_loader(samples(256)), val_loader()))
    assert trainer.global_step == 5


def once_noisy(trainer_step: int) -> Any:
    """A callback that moves a layer's statistics for one sample."""

    class Noise(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            layer = pl_module.net.bn
            if trainer.global_step == trainer_step:
                self.kept = layer.running_mean.clone()
                layer.running_mean.add_(100.0)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == trainer_step:
                pl_module.net.bn.running_mean.copy_(self.kept)

    return Noise()


def drifted(said: list[str]) -> list[str]:
    return [line for line in said if "since the start of the fit" in line]


@pytest.mark.parametrize("action", ["stop", "raise", "warn"])
def test_one_noisy_sample_does_not_act(action: Any) -> None:
    trainer = quiet(callbacks=[once_noisy(5), monitor(act_above=50.0, action=action)], max_epochs=1)
    said = warned(lambda: trainer.fit(module(1e-5), train_loader(samples(128)), val_loader()))
    assert not [line for line in said if "act_above" in line]
    assert trainer.global_step == 16


def test_one_wild_batch_is_not_called_alternating() -> None:
    wild = lambda x, step: x + 300.0 if step == 4 else x  # noqa: E731
    said = fit(module(1e-5, wild), monitor(), max_epochs=1, count=128)
    assert not [line for line in said if "alternate" in line], said


def test_a_warning_is_said_once_and_again_only_after_it_fell_below_half() -> None:
    callbacks = [once_noisy(5), once_noisy(8), monitor(warn_above=50.0)]
    said = drifted(fit(module(1e-5), *callbacks, max_epochs=1, count=128))
    assert [line.split("step ")[1].split(":")[0] for line in said] == ["5", "8"]
    assert all("net.bn moved since " in line and "new variance" in line for line in said)

    class Staying(pl.Callback):
        """Above, then at 0.6 of the threshold, then above again."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            layer = pl_module.net.bn
            if not hasattr(self, "mean"):
                self.mean, self.sigma = layer.running_mean.clone(), layer.running_var.sqrt()
            z = {5: 3.0, 6: 2.0, 7: 3.0}.get(trainer.global_step, 0.0 if trainer.global_step < 5 else 3.0)
            layer.running_mean.copy_(self.mean + z * self.sigma)

    watching = monitor(warn_above=5.0, modules="net.bn")
    said = drifted(fit(module(0.0), Staying(), watching, max_epochs=1, count=128))
    assert len(said) == 1, said


def test_acting_by_warning_is_said_in_the_next_fit_too() -> None:
    watching = monitor(act_above=0.5, action="warn")
    for _ in range(2):
        said = fit(module(fault=shifted_from(4)), watching, max_epochs=1)
        assert len([line for line in said if "above act_above" in line]) == 1, said


def test_validation_between_optimizer_steps_is_preceded_by_a_sample() -> None:
    watching = monitor()
    bad = module(fault=lambda x, step: x * torch.inf)
    said = fit(bad, watching, max_epochs=1, accumulate_grad_batches=100, val_check_interval=4, count=64)
    assert said[0].startswith("BatchNormMonitor: step 0: net.features.1")


def test_acting_by_warning_says_one_line_beside_the_first_warning() -> None:
    said = fit(
        module(1e-5, shifted_from(5, 20.0)),
        monitor(warn_above=0.2, act_above=0.5, modules="net.features"),
        max_epochs=1,
    )
    assert len([line for line in said if "is above warn_above" in line]) == 1
    assert len([line for line in said if "is above act_above=0.5" in line]) == 1


def test_after_a_run_that_raised_the_same_monitor_can_watch_another() -> None:
    watching = monitor(act_above=0.5, action="raise")
    with pytest.raises(BatchNormDriftError):
        fit(module(1e-5, shifted_from(5, 20.0)), watching)
    fit(module(1e-5), watching, max_epochs=1, count=32)
    assert watching.history.steps == [1, 2, 3, 4]


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_resumed_run_continues_history_and_reference_as_if_uninterrupted(tmp_path: Path) -> None:
    whole = monitor(every_n_steps=3)
    fit(module(), whole, max_epochs=4, count=64)
    first = monitor(every_n_steps=3)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(module(), first, saving, enable_checkpointing=True, max_epochs=2, count=64)
    path = tmp_path / "epoch=1.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]
    assert any(key.startswith("BatchNormMonitor") for key in state)
    second = monitor(every_n_steps=3)
    fit(module(), second, max_epochs=4, count=64, ckpt_path=path)
    assert second.history.steps == whole.history.steps
    assert second.history.epochs == whole.history.epochs
    # The order of the resumed epochs' batches differs; what was measured before does not, nor what is measured from.
    before = len(first.history)
    assert torch.equal(second.history.values()[:before], first.history.values())
    ratio = second.history.values()[before] / whole.history.values()[before]
    assert (ratio > 0.3).all(), "measured from the start of the resumed run"


@pytest.mark.parametrize("changed", [{"modules": "net.head"}, {"reference": "previous_epoch"}])
def test_a_checkpoint_of_other_layers_or_another_reference_is_said_to_be_so(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit(module(), monitor(), checkpoint, max_epochs=1, enable_checkpointing=True)
    watching, seen = monitor(**changed), Seen()
    said = fit(module(), watching, seen, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert len([line for line in said if "drift is measured from now on" in line]) == 1, said
    start = seen.snapshots[32].only(watching.history.names)
    expected = drift(start, seen.snapshots[64].only(watching.history.names))
    assert watching.history.values()[-1].tolist() == pytest.approx([float(one.max()) for one in expected.values()])


def test_what_was_said_is_not_said_again_after_resuming(tmp_path: Path) -> None:
    fault = shifted_from(3, 20.0)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    watching = monitor(warn_above=0.5, modules="net.features")
    said = fit(module(1e-6, fault), watching, saving, enable_checkpointing=True, max_epochs=1, count=128)
    assert said
    again = monitor(warn_above=0.5, modules="net.features")
    assert fit(module(1e-6, fault), again, max_epochs=2, count=128, ckpt_path=tmp_path / "epoch=0.ckpt") == []


def test_a_checkpoint_saved_after_the_fit_keeps_history_and_reference(tmp_path: Path) -> None:
    watching = monitor()
    trainer = quiet(callbacks=[watching], max_epochs=1)
    trainer.fit(module(), train_loader(samples(32)), val_loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = monitor()
    fit(module(), resumed, max_epochs=2, count=32, ckpt_path=tmp_path / "after.ckpt")
    assert resumed.history.steps == list(range(1, 9))


def test_a_checkpoint_saved_by_an_exception_keeps_history_and_reference(tmp_path: Path) -> None:
    class Boom(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                raise ZeroDivisionError

    skip_without(ModelCheckpoint, "save_on_exception")
    saving = ModelCheckpoint(tmp_path, filename="x", save_on_exception=True)
    with pytest.raises(ZeroDivisionError):
        fit(module(), monitor(), Boom(), saving, enable_checkpointing=True, count=32)
    [path] = tmp_path.glob("*.ckpt")
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    [state] = [state for key, state in callbacks.items() if key.startswith("BatchNormMonitor")]
    assert state["history"]["steps"] == [1, 2, 3]
    assert state["reference"] is not None


def test_a_second_fit_without_a_checkpoint_starts_a_new_history() -> None:
    watching = monitor()
    fit(module(), watching, max_epochs=1, count=32)
    fit(TamperedClassifier(seeded(lambda: Net(0.0))), watching, max_epochs=1, count=16)
    assert watching.history.steps == [1, 2]


def test_a_layer_replaced_before_the_fit_is_the_one_that_is_watched() -> None:
    class Late(TamperedClassifier):
        def configure_model(self) -> None:
            self.net.bn = torch.nn.BatchNorm2d(4)

    watching = monitor(modules="net.bn")
    late = Late(pretrained())
    fit(late, watching, max_epochs=2)
    assert float(watching.history.values()[-1]) > 0


def test_manual_optimization_with_two_optimizers_is_sampled_and_judged() -> None:
    class Manual(TamperedClassifier):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.net.features, self.net.head)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    watching = monitor(every_n_steps=2)
    net = pretrained()
    for layer in norms(net):
        layer.momentum = 0.001
        layer.num_batches_tracked.fill_(10_000)  # type: ignore[union-attr, operator]
    said = fit(Manual(net, lambda x, step: x + 5), watching, max_epochs=1)
    assert watching.history.steps == list(range(2, 66, 2))
    assert [line for line in said if "lags" in line]
