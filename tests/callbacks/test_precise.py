"""PreciseBatchNorm: validation and checkpoints hold population statistics, and training does not notice."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import schedulefree
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn import BatchNormFreezer, PreciseBatchNorm
from lightning_bn.functional import SelectionError, freeze_batch_norm, is_frozen, layer_status
from tests.averages import EMAWeightAveraging, WeightAveraging
from tests.callbacks.fits import (
    LAYERS,
    RECALIBRATED_FROM,
    Classifier,
    Recorder,
    quiet,
    samples,
    train_loader,
    trajectory,
    val_loader,
)
from tests.models import Broken, bits, fill_statistics, state_bits
from tests.oracle import assert_all_statistics, everything, generators, layer_inputs
from tests.versions import reading

NORMS = [name.removeprefix("net.") for name in LAYERS]


def data(**kwargs: Any) -> dict[str, Any]:
    return {"train_dataloaders": train_loader(**kwargs), "val_dataloaders": val_loader()}


def fit(module: pl.LightningModule, *callbacks: pl.Callback, loaders: dict[str, Any] | None = None, **kwargs: Any):
    pl.seed_everything(3, verbose=False)
    trainer = quiet(callbacks=list(callbacks), **{"num_sanity_val_steps": 0, **kwargs})
    trainer.fit(module, **(loaders or data()))
    return trainer


def assert_validated_precisely(module: Classifier, validations: int, batches: int | None = None, **kwargs: Any) -> None:
    """At each validation run the statistics were those of the batches that were run, under the weights of then."""
    assert len(module.validated) == validations
    for _, net, used in module.validated:
        assert len(used) == batches if batches else used
        assert_all_statistics(net, layer_inputs(net.train(), used, NORMS, **kwargs))


# Validation and checkpoint hold the population's statistics


def test_validation_sees_statistics_of_training_batches_under_the_weights_of_the_moment():
    module = Classifier()
    fit(module, PreciseBatchNorm(num_batches=3))
    assert_validated_precisely(module, validations=2, batches=3)
    weights = [bits(net.bn.weight) for _, net, _ in module.validated]
    assert weights[0] != weights[1]


def test_without_it_validation_sees_something_else():
    module = Classifier()
    fit(module)
    _, net, _ = module.validated[-1]
    with pytest.raises(AssertionError, match="off by"):
        assert_all_statistics(net, layer_inputs(net.train(), list(train_loader()), NORMS))


def test_batches_are_those_of_the_training_loader():
    module = Classifier()
    loader = train_loader(shuffle=False)
    fit(module, PreciseBatchNorm(num_batches=2), loaders={**data(), "train_dataloaders": loader})
    expected = [batch[0] for batch in loader][:2]
    for _, _, used in module.validated:
        assert [bits(x) for x in used] == [bits(x) for x in expected]


def test_no_more_batches_are_used_than_an_epoch_has():
    module = Classifier()
    callback = PreciseBatchNorm()
    fit(module, callback)
    assert_validated_precisely(module, validations=2, batches=4)
    assert (callback.last.num_batches, callback.last.num_samples) == (4, 28)


def test_what_was_done_is_told():
    module = Classifier()
    callback = PreciseBatchNorm(num_batches=3)
    assert callback.last is None
    fit(module, callback)
    assert callback.last.layers == LAYERS
    assert (callback.last.num_batches, callback.last.requested_batches) == (3, 3)
    assert callback.last.after.mean.shape == (14,)


def test_one_line_says_what_was_done(caplog):
    with caplog.at_level(logging.INFO):
        fit(Classifier(), PreciseBatchNorm(num_batches=3), max_epochs=1)
    lines = [record.getMessage() for record in caplog.records if "PreciseBatchNorm" in record.getMessage()]
    assert len(lines) == 1
    assert "epoch 0" in lines[0]
    assert "24 samples" in lines[0]


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_every_checkpoint_holds_what_validation_saw(tmp_path, interval):
    module = Classifier()
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}", monitor="val_loss")
    trainer_settings = {"enable_checkpointing": True, "val_check_interval": interval}
    fit(module, saver, PreciseBatchNorm(num_batches=3), **trainer_settings)
    assert_validated_precisely(module, validations=int(2 / interval), batches=3)
    for step, net, _ in module.validated:
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert {name: bits(value) for name, value in saved.items()} == {
            f"net.{name}": value for name, value in state_bits(net).items()
        }


class Averaging(WeightAveraging):
    """The plain mean of all weights so far, buffers included."""


AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "mean": Averaging,
}


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize("interval", [1.0, 0.5])
@pytest.mark.parametrize("averaging", AVERAGING)
def test_averaged_weights_get_statistics_of_their_own(tmp_path, averaging, interval, first):
    module = Classifier()
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}")
    callbacks = [PreciseBatchNorm(num_batches=3), AVERAGING[averaging]()]
    live = []

    class Live(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            live.append(bits(pl_module.net.bn.weight))

    fit(
        module,
        saver,
        Live(),
        *(callbacks if first else callbacks[::-1]),
        enable_checkpointing=True,
        val_check_interval=interval,
    )
    assert_validated_precisely(module, validations=int(2 / interval), batches=3)
    for (step, net, _), live_weight in zip(module.validated, live, strict=True):
        assert bits(net.bn.weight) != live_weight, "the averaged weights were not in place"
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert {name: bits(value) for name, value in saved.items()} == {
            f"net.{name}": value for name, value in state_bits(net).items()
        }


@pytest.mark.parametrize("averaging", AVERAGING)
def test_averaging_itself_is_not_disturbed(averaging):
    runs = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=2)]):
        trace, parameters, _ = trajectory(
            Classifier, data, *callbacks, AVERAGING[averaging](), val_check_interval=0.5, num_sanity_val_steps=0
        )
        runs.append((trace, parameters))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_weights_that_a_schedule_free_optimizer_swaps_in_get_statistics_of_their_own(first):
    class Swap(pl.Callback):
        """What the optimizer's authors ask for around training and validation."""

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].train()

        def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].eval()

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].train()

    class ScheduleFree(Classifier):
        def configure_optimizers(self) -> Any:
            return schedulefree.SGDScheduleFree(self.parameters(), lr=0.5)

    module = ScheduleFree()
    callbacks = [PreciseBatchNorm(num_batches=3), Swap()]
    fit(module, *(callbacks if first else callbacks[::-1]))
    assert_validated_precisely(module, validations=2, batches=3)


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_stochastic_weight_averaging_gets_statistics_of_its_own(first):
    module = Classifier()
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    callbacks = [PreciseBatchNorm(num_batches=3), swa]
    fit(module, *(callbacks if first else callbacks[::-1]), max_epochs=3)
    assert_validated_precisely(module, validations=len(module.validated), batches=3)
    assert len(module.validated) >= 3


# Training is bit-identical


@pytest.mark.parametrize("interval", [1.0, 0.5])
@pytest.mark.parametrize("generator", [True, False], ids=["generator", "global"])
@pytest.mark.parametrize(
    "workers",
    [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["main process", "workers", "persistent workers"],
)
def test_training_is_bit_identical_to_a_run_without_it(workers, generator, interval):
    def loaders() -> dict[str, Any]:
        own = {"generator": torch.Generator().manual_seed(5)} if generator else {}
        return data(**workers, **own)

    callback = PreciseBatchNorm(num_batches=3)
    runs = [trajectory(Classifier, loaders, *used, val_check_interval=interval) for used in ([], [callback])]
    assert callback.last.num_batches == 3
    assert len(runs[0][0]) == 8
    assert runs[0][:2] == runs[1][:2]


def test_orders_of_batches_differ_from_epoch_to_epoch():
    # Or the comparisons of orders would mean little.
    trace, _, _ = trajectory(Classifier, data)
    assert [seen for seen, _ in trace[:4]] != [seen for seen, _ in trace[4:]]


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_train_batches": 3, "val_check_interval": 2},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"overfit_batches": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 3, "max_epochs": 3},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_training_is_bit_identical_under_the_trainers_settings(settings):
    callback = PreciseBatchNorm(num_batches=2)
    shuffle = {"shuffle": False} if "overfit_batches" in settings else {}
    runs = [trajectory(Classifier, lambda: data(**shuffle), *used, **settings) for used in ([], [callback])]
    assert callback.last is not None
    assert runs[0][:2] == runs[1][:2]


# When


class Counting(PreciseBatchNorm):
    """Counts what it does."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.done: list[int] = []

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        before = self.last
        super().on_validation_batch_start(trainer, *args)
        if self.last is not before:
            self.done.append(trainer.global_step)


def test_it_does_nothing_in_the_sanity_check():
    callback = Counting(num_batches=2)
    module = Classifier()
    fit(module, callback, num_sanity_val_steps=2, max_epochs=1)
    assert callback.done == [4]
    assert len(module.validated) == 1


@pytest.mark.parametrize("every", [1, 2, 3])
def test_it_runs_before_every_nth_validation(every):
    callback = Counting(num_batches=2, every_n_validations=every)
    fit(Classifier(), callback, max_epochs=6, limit_train_batches=2)
    assert callback.done == [2 * epoch for epoch in range(1, 7) if epoch % every == 0]


def test_it_runs_once_per_validation_with_several_loaders():
    callback = Counting(num_batches=2)

    class TwoLoaders(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    fit(TwoLoaders(), callback, loaders={**data(), "val_dataloaders": [val_loader(), val_loader()]})
    assert callback.done == [4, 8]


def test_fast_dev_run_recalibrates_from_one_batch():
    callback = PreciseBatchNorm()
    fit(Classifier(), callback, fast_dev_run=True)
    assert callback.last.num_batches == 1


def test_without_validation_the_last_checkpoint_and_the_model_are_precise(tmp_path):
    module = Classifier()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
    callback = PreciseBatchNorm(num_batches=3)
    fit(module, saver, callback, enable_checkpointing=True, limit_val_batches=0)
    assert callback.last.num_batches == 3
    assert_all_statistics(module.net, layer_inputs(module.net.train(), RECALIBRATED_FROM[-3:], NORMS))
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)["state_dict"]
    assert {name: bits(value) for name, value in saved.items()} == state_bits(module)


def test_it_does_nothing_in_a_barebones_fit():
    callback = Counting(num_batches=2)
    module = Classifier()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, barebones=True, callbacks=[callback])
    trainer.fit(module, **data())
    assert callback.done == []
    assert callback.last is None


def test_validating_on_its_own_changes_nothing():
    module = Classifier()
    callback = Counting(num_batches=2)
    trainer = fit(module, callback)
    found = everything(module)
    trainer.validate(module, val_loader(), verbose=False)
    quiet(callbacks=[Counting()]).validate(Classifier(), val_loader(), verbose=False)
    assert everything(module)["net.bn"] == found["net.bn"]
    assert callback.done == [4, 8]


def test_test_and_predict_change_nothing():
    class WithTest(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch[0])

    module = WithTest()
    callback = Counting(num_batches=2)
    trainer = quiet(callbacks=[callback])
    found = state_bits(module)
    trainer.test(module, val_loader(), verbose=False)
    trainer.predict(module, val_loader())
    assert state_bits(module) == found
    assert callback.done == []


# Which layers


@pytest.mark.filterwarnings("ignore:freezing .* BatchNorm layers whose running statistics are still")
@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
def test_layers_of_a_freezer_are_untouched(first):
    module = Classifier()
    fill_statistics(module)
    held = state_bits(module.net.features[1])
    freezer, callback = BatchNormFreezer(["net.features"]), PreciseBatchNorm(num_batches=3)
    fit(module, *((callback, freezer) if first else (freezer, callback)))
    assert freezer.report.identical
    assert callback.last.frozen == ("net.features.1",)
    assert callback.last.layers == LAYERS[1:]
    for _, net, used in module.validated:
        assert state_bits(net.features[1]) == held
        assert_all_statistics(net, layer_inputs(net.train(), used, NORMS[1:]))


def test_everything_frozen_is_no_failure(caplog):
    module = Classifier()
    fill_statistics(module)
    callback = PreciseBatchNorm(num_batches=3)
    with caplog.at_level(logging.INFO):
        fit(module, BatchNormFreezer(), callback)
    assert callback.last is None
    assert any("PreciseBatchNorm" in record.getMessage() for record in caplog.records)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_layers_frozen_by_the_function_are_untouched():
    module = Classifier()
    fill_statistics(module)
    freeze_batch_norm(module, "net.bn")
    held = state_bits(module.net.bn)
    callback = PreciseBatchNorm(num_batches=3)
    fit(module, callback)
    assert state_bits(module.net.bn) == held
    assert callback.last.frozen == ("net.bn",)


def test_layers_the_user_keeps_in_eval_are_untouched():
    class Finetuned(Classifier):
        def on_train_epoch_start(self) -> None:
            self.net.features.eval()

    module = Finetuned()
    fill_statistics(module)
    held = bits(module.net.features[1].running_mean)
    callback = PreciseBatchNorm(num_batches=3)
    fit(module, callback)
    assert bits(module.net.features[1].running_mean) == held
    assert callback.last.frozen == ("net.features.1",)
    assert not module.net.features.training
    assert module.net.bn.training


def test_only_selected_layers_are_recalibrated():
    module = Classifier()
    callback = PreciseBatchNorm(num_batches=3, modules=["features", "head"], exclude="head", root="net")
    fit(module, callback)
    assert callback.last.layers == ("net.features.1",)


def test_layers_built_in_configure_model_are_found():
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.late = None

        def configure_model(self) -> None:
            if self.late is None:
                self.late = nn.BatchNorm2d(3)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step([self.late(batch[0]), batch[1]], batch_idx)

    module = Late()
    callback = PreciseBatchNorm(num_batches=3)
    fit(module, callback)
    assert set(callback.last.layers) == {*LAYERS, "late"}


def test_layers_that_the_module_replaces_between_epochs_are_found():
    class Growing(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net.bn = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))

    module = Growing()
    callback = PreciseBatchNorm(num_batches=3)
    fit(module, callback)
    assert callback.last.layers == ("net.features.1", "net.bn.0", "net.bn.1", "net.head.1")
    assert callback.last.frozen == ()


def test_when_a_layer_was_recalibrated_is_recorded():
    module = Classifier()
    fit(module, PreciseBatchNorm(num_batches=2, modules="net.bn"))
    assert layer_status(module.net.bn).recalibrated_at == 8
    assert layer_status(module.net.features[1]).recalibrated_at is None
    assert not is_frozen(module.net.bn)


# The model in training


def test_containers_run_as_in_training():
    class Branching(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.train_only = nn.Sequential(nn.BatchNorm2d(3))
            self.modes = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch[0], batch[1]
            if self.training and self.trainer.training and not self.trainer.validating:
                x = self.train_only(x)
            return super().training_step([x, y], batch_idx)

    module = Branching()
    callback = PreciseBatchNorm(num_batches=3)
    fit(module, callback)
    assert "train_only.0" in callback.last.layers
    assert callback.last.unreached == ()


def test_dropout_is_off_and_modes_come_back():
    module = Classifier(dropout=0.9)
    seen = []

    class Modes(pl.Callback):
        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(any(part.training for part in pl_module.modules()))

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(not all(part.training for part in pl_module.modules()))

    fit(module, PreciseBatchNorm(num_batches=3), Modes())
    assert_validated_precisely(module, validations=2, batches=3)
    assert seen
    assert not any(seen)


def test_statistics_under_mixed_precision_are_those_of_training():
    def autocast(net: nn.Module, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    module = Classifier()
    fit(module, PreciseBatchNorm(num_batches=3), precision="bf16-mixed")
    assert_validated_precisely(module, validations=2, batches=3, run=autocast)


def test_model_in_double_precision_is_recalibrated_with_converted_input():
    module = Classifier()
    fit(module, PreciseBatchNorm(num_batches=3), precision="64-true")
    assert module.validated[0][2][0].dtype == torch.float64
    assert_validated_precisely(module, validations=2, batches=3)


def test_model_in_bf16_is_recalibrated_to_the_precision_of_bf16():
    module = Classifier()
    fit(module, PreciseBatchNorm(num_batches=3), precision="bf16-true")
    assert len(module.validated) == 2
    for _, net, used in module.validated:
        assert used[0].dtype == net.bn.running_mean.dtype == torch.bfloat16
        assert_all_statistics(net, layer_inputs(net.train(), used, NORMS), tolerance=2**-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_network_is_recalibrated_and_not_compiled_again():
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.net.features = torch.compile(self.net.features, backend=counting, dynamic=True)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    counts = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=2)]):
        torch._dynamo.reset()
        graphs.clear()
        fit(Compiled(), *callbacks, max_epochs=4)
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert counts[0] > 0
    assert counts[0] == counts[1]


# Failures


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 3])
def test_failure_in_the_step_leaves_model_and_trainer_as_they_were(call, error):
    class Failing(Classifier):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.counter = 0
            self.items: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.counter += 1
            self.items.append(batch_idx)
            loss = super().training_step(batch, batch_idx)
            if not torch.is_grad_enabled():
                Failing.calls += 1
                if Failing.calls == call:
                    raise error("in the step")
            return loss

    found: list[Any] = []

    def look(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module._current_fx_name = None  # where Lightning is, which has moved on
        found.append((everything(pl_module), generators(), trainer.state.stage, trainer.loggers))

    class Before(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            look(trainer, pl_module)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            look(trainer, pl_module)

    module = Failing()
    with pytest.raises((Broken, SystemExit)):
        fit(module, Before(), PreciseBatchNorm(num_batches=3))
    assert found[0] == found[1]
    assert (module.counter, module.items) == (4, [0, 1, 2, 3])
    assert "log" not in module.__dict__
    assert "log_dict" not in module.__dict__


def test_after_a_failure_the_same_module_and_callback_train_on():
    class FailsOnce(Classifier):
        failed = False

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if not torch.is_grad_enabled() and not FailsOnce.failed:
                FailsOnce.failed = True
                raise Broken
            return super().training_step(batch, batch_idx)

    module = FailsOnce()
    callback = PreciseBatchNorm(num_batches=3)
    with pytest.raises(Broken):
        fit(module, callback)
    module.train()
    fit(module, callback)
    assert_validated_precisely(module, validations=2, batches=3)


def test_loader_that_fails_during_the_pass_leaves_the_model_as_it_was():
    class Failing(torch.utils.data.Dataset):
        reads = 0

        def __len__(self) -> int:
            return 28

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            if self.reads == 28 + 20:
                raise Broken("on reading")
            return samples()[index]

    before = []

    class Before(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            before.append(everything(pl_module))

    module = Classifier()
    with pytest.raises(Broken):
        fit(module, Before(), PreciseBatchNorm(), loaders=data(dataset=Failing()))
    assert everything(module) == before[0]


def test_nothing_of_the_model_is_kept_after_a_fit():
    callback = PreciseBatchNorm(num_batches=2)
    fit(Classifier(), callback)
    assert not any(isinstance(value, nn.Module) for value in vars(callback).values())
    assert copy.deepcopy(callback).num_batches == 2
    assert not any(isinstance(item, nn.Module) for v in vars(callback).values() if isinstance(v, list) for item in v)


# Bad input


@pytest.mark.parametrize("arguments", [{"num_batches": 0}, {"num_batches": -1}, {"every_n_validations": 0}])
def test_arguments_below_one_are_refused_at_once(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(MisconfigurationException, match=f"{name}={value}"):
        PreciseBatchNorm(**arguments)


def assert_refused_before_training(module: pl.LightningModule, callback: pl.Callback, error: type, match: str) -> None:
    recorder = Recorder()
    found = state_bits(module)
    with pytest.raises(error, match=match):
        fit(module, callback, recorder, num_sanity_val_steps=2)
    assert recorder.trace == []
    assert state_bits(module) == found


def test_step_that_does_not_exist_is_refused_before_training():
    assert_refused_before_training(
        Classifier(), PreciseBatchNorm(step="traning_step"), MisconfigurationException, "traning_step"
    )


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_under_manual_optimization_is_refused_before_training():
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    assert_refused_before_training(
        Manual(), PreciseBatchNorm(), MisconfigurationException, "manual optimization.*step='forward'"
    )


@pytest.mark.parametrize("step", ["forward", "predict_step", "statistics"])
def test_under_manual_optimization_other_steps_work(step):
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])

        def statistics(self, batch: Any) -> None:
            self.net(batch[0])

    module = Manual()
    callback = PreciseBatchNorm(num_batches=2, step=step)
    fit(module, callback, loaders=data(shuffle=False))
    _, net, _ = module.validated[-1]
    used = [batch[0] for batch in train_loader(shuffle=False)][:2]
    assert_all_statistics(net, layer_inputs(net.train(), used, NORMS))


def test_selection_that_means_nothing_is_refused_before_training():
    assert_refused_before_training(Classifier(), PreciseBatchNorm(modules="net.haed"), SelectionError, "net.head")


def test_model_without_batch_norm_is_refused_before_training():
    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))

    assert_refused_before_training(Plain(), PreciseBatchNorm(), SelectionError, "BatchNorm")


# Checkpoints and resuming


class Plain(Classifier):
    """Without dropout, so that a resumed run needs no generator's state."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)


@pytest.mark.parametrize("averaging", [False, True], ids=["plain", "averaged"])
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, interval, averaging):
    def callbacks() -> list[pl.Callback]:
        averages = [EMAWeightAveraging(decay=0.9)] if averaging else []
        return [Counting(num_batches=3, every_n_validations=2), *averages]

    def run(**kwargs: Any) -> tuple[Classifier, Counting]:
        module = Plain()
        used = callbacks()
        trainer = quiet(
            callbacks=[*used, ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}-{step}")],
            enable_checkpointing=True,
            num_sanity_val_steps=0,
            max_epochs=3,
            val_check_interval=interval,
        )
        trainer.fit(module, **data(shuffle=False), **kwargs)
        return module, used[0]

    whole, whole_callback = run()
    resumed, resumed_callback = run(**reading(tmp_path / "epoch=0-step=4.ckpt"))
    assert state_bits(resumed) == state_bits(whole)
    assert resumed_callback.done == [step for step in whole_callback.done if step > 4]
    # The checkpoints of the resumed run lie beside those of the first one.
    last = [tmp_path / f"epoch=2-step=12{version}.ckpt" for version in ("", "-v1")]
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in last]
    assert {k: bits(v) for k, v in saved[0].items()} == {k: bits(v) for k, v in saved[1].items()}


@pytest.mark.parametrize("restore", [False, True])
def test_state_is_small_and_plain(tmp_path, restore):
    callback = PreciseBatchNorm(num_batches=2, restore=restore)
    fit(Classifier(), callback)
    path = tmp_path / "state.pt"
    torch.save(callback.state_dict(), path)
    assert path.stat().st_size < 10_000
    again = PreciseBatchNorm(num_batches=2, restore=restore)
    again.load_state_dict(torch.load(path, weights_only=True))
    torch.save(again.state_dict(), tmp_path / "again.pt")
    assert (tmp_path / "again.pt").stat().st_size == path.stat().st_size


def test_statistics_stay_in_the_model_after_the_fit():
    module = Classifier()
    fit(module, PreciseBatchNorm(num_batches=3))
    _, net, _ = module.validated[-1]
    assert state_bits(module.net) == state_bits(net)


def test_checkpoint_loads_into_a_run_without_the_callback(tmp_path):
    module = Classifier()
    trainer = fit(module, PreciseBatchNorm(num_batches=3))
    path = Path(tmp_path) / "model.ckpt"
    trainer.save_checkpoint(path)
    again = Classifier.load_from_checkpoint(path)
    assert state_bits(again) == state_bits(module)


def test_batches_of_one_value_per_channel_are_skipped_in_a_fit():
    module = Classifier()
    callback = PreciseBatchNorm()
    # 25 samples in batches of 8: the last has one, which training leaves out as well.
    loaders = data(dataset=samples(25), shuffle=False)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        fit(Classifier(), loaders=loaders)
    fit(module, callback, loaders=loaders, limit_train_batches=3)
    assert (callback.last.num_batches, callback.last.skipped_batches) == (3, 0)


def test_any_iterable_that_can_be_iterated_again_serves_as_a_loader():
    class Batches:
        def __iter__(self) -> Any:
            return iter(DataLoader(samples(), batch_size=8))

    module = Classifier()
    loaders = {"train_dataloaders": Batches(), "val_dataloaders": val_loader()}
    fit(module, PreciseBatchNorm(num_batches=3), loaders=loaders)
    assert_validated_precisely(module, validations=2, batches=3)
    assert RECALIBRATED_FROM == []


# How much data, whose, and for how long


def test_number_of_samples_ends_the_pass():
    callback = PreciseBatchNorm(num_batches=100, num_samples=15)
    module = Classifier()
    fit(module, callback)
    assert_validated_precisely(module, validations=2, batches=2)
    assert callback.last.num_samples == 16


def test_pass_ends_when_the_standard_error_is_small_enough():
    loaders = data(dataset=samples(1200), batch_size=30)
    module, callback = Classifier(dropout=0.0), PreciseBatchNorm(num_batches=40, max_standard_error=0.2)
    fit(module, callback, loaders=loaders, max_epochs=1)
    assert callback.last.standard_error <= 0.2
    assert callback.last.num_batches < 40
    assert_validated_precisely(module, validations=1, batches=callback.last.num_batches)


def test_nothing_happens_before_the_first_epoch_asked_for():
    callback = Counting(num_batches=2, start_epoch=2)
    fit(Classifier(), callback, max_epochs=4)
    assert callback.done == [12, 16]


def test_recent_batches_are_the_last_that_training_used_and_cost_no_loading():
    class Reads(torch.utils.data.Dataset):
        count = 0

        def __len__(self) -> int:
            return 28

        def __getitem__(self, index: int) -> Any:
            Reads.count += 1
            return samples()[index]

    class Trained(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.recent = [*getattr(self, "recent", []), bits(batch[0])]

    module = Trained()
    callback = PreciseBatchNorm(num_batches=3, source="recent")
    fit(module, callback, loaders=data(dataset=Reads()))
    assert Reads.count == 2 * 28
    assert_validated_precisely(module, validations=2, batches=3)
    assert [bits(x) for x in module.validated[0][2]] == module.recent[1:4]
    assert [bits(x) for x in module.validated[1][2]] == module.recent[5:8]


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_training_is_bit_identical_with_recent_batches(settings):
    callbacks = [], [PreciseBatchNorm(num_batches=2, source="recent")]
    runs = [trajectory(Classifier, data, *used, val_check_interval=0.5, **settings) for used in callbacks]
    assert runs[0][:2] == runs[1][:2]


class WithTarget(Classifier):
    """Has a loader of another domain."""

    def target_dataloader(self) -> Any:
        return train_loader(samples(24, seed=50), shuffle=False)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_batches_of_another_loader_are_used_where_it_is_named():
    module = WithTarget()
    fit(module, PreciseBatchNorm(num_batches=2, source_method="module.target_dataloader", step="predict_step"))
    expected = [batch[0] for batch in module.target_dataloader()][:2]
    for _, net, _ in module.validated:
        assert_all_statistics(net, layer_inputs(net.train(), expected, NORMS))


@pytest.mark.parametrize("run", ["validate", "test"])
def test_with_another_loader_validating_and_testing_are_precise_too(run):
    module = WithTarget()
    callback = PreciseBatchNorm(num_batches=2, source_method="module.target_dataloader", step="predict_step")
    getattr(quiet(callbacks=[callback]), run)(module, val_loader(), verbose=False)
    expected = [batch[0] for batch in module.target_dataloader()][:2]
    assert_all_statistics(module.net, layer_inputs(module.net.train(), expected, NORMS))
    module.net(expected[0]).sum().backward()  # testing runs under inference mode, training has to go on


@pytest.mark.parametrize("method", ["module.nothing", "datamodule.loader", "target_dataloader", "trainer.fit"])
def test_loader_method_that_does_not_exist_is_refused_before_training(method):
    assert_refused_before_training(
        WithTarget(), PreciseBatchNorm(source_method=method), MisconfigurationException, method
    )


class Buffers(pl.Callback):
    """The buffers that each training batch finds."""

    def __init__(self) -> None:
        self.found: list[dict[str, bytes]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.found.append({name: bits(buffer) for name, buffer in pl_module.named_buffers()})


@pytest.mark.parametrize("averaging", [[], ["ema"]], ids=["plain", "averaged"])
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_moving_average_comes_back_where_that_is_asked_for(tmp_path, interval, averaging):
    found = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=3, restore=True)]):
        module, buffers = Classifier(), Buffers()
        saver = ModelCheckpoint(dirpath=tmp_path / str(len(found)), save_top_k=-1, filename="{step}")
        averages = [AVERAGING[name]() for name in averaging]
        fit(module, *callbacks, *averages, buffers, saver, val_check_interval=interval, enable_checkpointing=True)
        found.append(buffers.found)
    assert found[0] == found[1]
    assert_validated_precisely(module, validations=int(2 / interval), batches=3)
    for step, net, _ in module.validated:
        saved = torch.load(tmp_path / "1" / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert {name.removeprefix("net."): bits(value) for name, value in saved.items()} == state_bits(net)


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_resumed_run_brings_the_moving_average_back(tmp_path, interval):
    def run(**kwargs: Any) -> tuple[Classifier, Buffers]:
        module, buffers = Plain(), Buffers()
        saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}")
        trainer = quiet(
            callbacks=[PreciseBatchNorm(num_batches=3, restore=True), buffers, saver],
            enable_checkpointing=True,
            num_sanity_val_steps=0,
            max_epochs=2,
            val_check_interval=interval,
        )
        trainer.fit(module, **data(shuffle=False), **kwargs)
        return module, buffers

    whole, whole_buffers = run()
    resumed, resumed_buffers = run(**reading(tmp_path / "step=4.ckpt"))
    assert resumed_buffers.found == whole_buffers.found[4:]
    assert state_bits(resumed) == state_bits(whole)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_standard_error": 0.0}, "max_standard_error"),
        ({"source": "val"}, "val"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(arguments, named):
    with pytest.raises(MisconfigurationException, match=named):
        PreciseBatchNorm(**arguments)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(samples())


def endless() -> Any:
    return DataLoader(Endless(), batch_size=4)


def short() -> Any:
    return train_loader()


@pytest.mark.parametrize(
    "loader", [endless, lambda: [short(), endless()], lambda: CombinedLoader({"a": endless()}, "max_size")]
)
def test_endless_loader_of_a_source_method_is_refused_without_a_limit(loader: Callable[[], Any]) -> None:
    class WithTarget(Classifier):
        def target_dataloader(self) -> Any:
            return loader()

    with pytest.raises(MisconfigurationException, match=r"module\.target_dataloader returns has no length"):
        fit(WithTarget(), PreciseBatchNorm(num_batches=None, source_method="module.target_dataloader"))


def test_endless_loader_of_a_source_method_is_used_as_far_as_the_limit_goes():
    class WithTarget(Classifier):
        def target_dataloader(self) -> Any:
            return endless()

    callback = PreciseBatchNorm(num_batches=None, num_samples=12, source_method="module.target_dataloader")
    fit(WithTarget(), callback)
    assert callback.last.num_samples == 12


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluation_without_a_source_method_says_that_nothing_is_recalibrated(verb, caplog):
    class WithTest(Classifier):
        test_step = Classifier.validation_step

    with caplog.at_level(logging.INFO):
        getattr(quiet(callbacks=[PreciseBatchNorm()]), verb)(WithTest(), val_loader(), verbose=False)
    said = "outside of a fit it has no batches to recalibrate from: the evaluation uses the statistics that the layers"
    assert caplog.text.count(said) == 1


def test_sanity_check_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        fit(Classifier(), PreciseBatchNorm(num_batches=1), num_sanity_val_steps=2, max_epochs=1)
    assert "source_method" not in caplog.text


@pytest.mark.parametrize("modules", [None, "net.bn"])
def test_layer_taken_out_of_the_model_in_mid_fit_ends_nothing(modules):
    class Shrinks(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net.bn = nn.Identity()

    callback = PreciseBatchNorm(num_batches=2, modules=modules, restore=True)
    if modules:
        with pytest.warns(UserWarning, match=r"'net\.bn'"):
            fit(Shrinks(), callback, max_epochs=3)
    else:
        fit(Shrinks(), callback, max_epochs=3)
        assert callback.last.layers == ("net.features.1", "net.head.1")


def test_step_that_drops_as_a_function_is_told_of_once_and_can_be_mended(caplog):
    class Drops(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((F.dropout(batch[0], 0.5, self.training), batch[1]), batch_idx)

    with caplog.at_level(logging.INFO):
        fit(Drops(), PreciseBatchNorm(num_batches=2), max_epochs=3)
        assert caplog.text.count("drew random numbers") == 1
        fit(Drops(), PreciseBatchNorm(num_batches=2, containers_in_eval=True))
        fit(Drops(), PreciseBatchNorm(num_batches=2, containers_in_eval=False))
    assert caplog.text.count("drew random numbers") == 1


def test_only_layers_that_see_several_loaders_are_told_apart(caplog):
    """Two loaders: a shared layer sees both, and each head its own."""

    class Shared(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            near, far = batch["near"][0], batch["far"][0] + 30
            return self.a(self.stem(near)).mean() + self.b(self.stem(far)).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.a(self.stem(batch[0]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    loaders = {"train_dataloaders": {"near": short(), "far": short()}, "val_dataloaders": val_loader()}
    callback = PreciseBatchNorm(num_batches=3)
    with caplog.at_level(logging.INFO):
        fit(Shared(), callback, loaders=loaders, max_epochs=1)
    assert list(callback.last.uses_apart) == ["stem"]
    caplog.clear()
    module = Shared()
    freezer = BatchNormFreezer("stem")
    with caplog.at_level(logging.INFO):
        fit(fill_statistics(module), freezer, callback, loaders=loaders, max_epochs=1)
    assert callback.last.uses_apart == {}
    assert "several loaders" not in caplog.text
