"""Averaged weights bring averages of every task's statistics, at the same moments and by the same functions."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_bn import PreciseBatchNorm
from tests.averages import EMAWeightAveraging, WeightAveraging
from tests.callbacks.fits import quiet
from tests.callbacks.task_fits import (
    TASKS,
    SeparateStatistics,
    TasksModule,
    batch_of,
    batches_of,
    callback,
    fit,
    loader_of,
    norms,
    sets,
)
from tests.callbacks.test_tasks import ByStep, Save, straight_and_resumed
from tests.models import bits


class Oracle(SeparateStatistics):
    """An average of each task's own copy of the network, updated as the callback updates the module's."""

    def __init__(self, averaging: WeightAveraging) -> None:
        super().__init__()
        self._averaging = averaging
        self.averages: dict[str, AveragedModel] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        model: Any = self._averaging._average_model
        functions = {"avg_fn": model.avg_fn, "multi_avg_fn": model.multi_avg_fn, "use_buffers": model.use_buffers}
        self.averages = {task: AveragedModel(net, **functions) for task, net in self.nets.items()}
        update = model.update_parameters

        def both(module: nn.Module) -> None:
            update(module)
            for task, net in self.nets.items():
                self.averages[task].update_parameters(net)

        model.update_parameters = both

    def sets(self) -> dict[str, bytes]:
        return {
            f"{task}/net.{name}.{key}": bits(buffer)
            for task, average in self.averages.items()
            for name, layer in norms(average.module).items()
            for key, buffer in layer.named_buffers()
        }


def averaging(kind: str) -> WeightAveraging:
    if kind == "ema":
        return EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
    return WeightAveraging(use_buffers=kind == "mean")


@pytest.mark.parametrize("kind", ["ema", "mean", "without buffers"])
@pytest.mark.parametrize("order", [1, -1])
def test_each_task_has_an_average_of_its_own_wherever_the_callback_stands(kind: str, order: int) -> None:
    average, tasks = averaging(kind), callback()
    oracle, module = Oracle(average), TasksModule()
    fit(module, batches_of(TASKS * 4), *[average, tasks][::order], oracle)
    assert sets(tasks.bank) == oracle.sets()
    assert "_swap_models" not in vars(average)


def test_validation_uses_the_averages_and_training_goes_on_with_its_own() -> None:
    def run(val: Any) -> Any:
        average, tasks, module = EMAWeightAveraging(decay=0.5), callback(), TasksModule()
        oracle = Oracle(average)
        fit(module, batches_of(TASKS * 4), average, tasks, oracle, val=val, num_sanity_val_steps=0)
        return module, oracle, tasks

    val = batches_of(["seg", "depth"], seed=90)
    module, oracle, tasks = run([val])
    expected = []
    for batch in val:
        net = oracle.averages[batch["task"]].module.eval()
        weights = dict(module.net.named_parameters())  # averaged by now
        expected.append(bits(torch.func.functional_call(net, weights, (batch["x"],))))
    assert module.put_out == expected
    assert sets(tasks.bank) == sets(run(None)[2].bank)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_file_holds_averages_and_what_training_goes_on_with(tmp_path: Any) -> None:
    average, tasks, module = EMAWeightAveraging(decay=0.5), callback(), ByStep()
    current: dict[str, bytes] = {}

    class Look(Save):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            super().on_train_batch_end(trainer)
            if trainer.global_step == self.step:
                current.update(sets(tasks.bank))

    fit(module, batches_of(TASKS * 3), average, tasks, Look(tmp_path / "c.ckpt", 6))
    file = torch.load(tmp_path / "c.ckpt", weights_only=True)
    state = file["callbacks"]["TaskBatchNorm"]
    kept = {f"{task}/{key}": bits(one) for task, each in state["current_sets"].items() for key, one in each.items()}
    assert kept.items() <= current.items()
    assert state["averaged"] == 6
    # The averages fit the averaged weights of the state dict, for whoever only evaluates.
    fresh, loader = ByStep(), loader_of(batches_of(["seg"], seed=90))
    quiet(callbacks=[callback()]).validate(fresh, loader, tmp_path / "c.ckpt", verbose=False)
    by_hand = TasksModule()
    by_hand.load_state_dict({**file["state_dict"], **dict(state["sets"]["seg"].items())})
    assert fresh.put_out == [bits(by_hand.eval().net(batch_of("seg", 90)["x"]))]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("steps", [9, 4])
def test_resumed_averages_are_those_of_the_uninterrupted_run(tmp_path: Any, steps: int) -> None:
    straight, resumed = straight_and_resumed(tmp_path / "c.ckpt", steps, beside=lambda: [EMAWeightAveraging(decay=0.5)])
    assert straight == resumed


def test_recalibration_before_the_last_file_is_of_the_averages() -> None:
    average, tasks, module = EMAWeightAveraging(decay=0.5), callback(), TasksModule()
    precise = PreciseBatchNorm(num_batches=9)
    fit(module, batches_of(TASKS * 3), average, tasks, precise, val=[batches_of(TASKS, seed=90)])
    for task in TASKS:
        net = copy.deepcopy(module.net).train()
        inputs = [batch["x"] for batch in batches_of(TASKS * 3) if batch["task"] == task]
        mean = torch.cat([net.body[0](x) for x in inputs]).mean(0)
        found = dict(tasks.bank.parts())[task]["net.body.1"]["running_mean"]
        assert torch.allclose(found, mean, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:TaskBatchNorm. outside of any task")
@pytest.mark.filterwarnings("ignore:tensors of 3 BatchNorm layers with statistics per task were replaced")
def test_another_kind_of_average_is_named() -> None:
    with pytest.warns(
        UserWarning, match="'StochasticWeightAveraging' averages only the statistics of the default task 'det'"
    ):
        fit(TasksModule(), batches_of(TASKS), StochasticWeightAveraging(0.1, swa_epoch_start=5), callback())


def test_file_that_is_saved_on_an_exception_holds_the_averages(tmp_path: Any) -> None:
    class Fails(ByStep):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 5:
                raise RuntimeError("as planned")
            return super().training_step(batch, batch_idx)

    class Saves(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "c.ckpt")

    average, tasks = EMAWeightAveraging(decay=0.5), callback()
    with pytest.raises(RuntimeError, match="as planned"):
        fit(Fails(), batches_of(TASKS * 3), average, tasks, Saves())
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]["TaskBatchNorm"]
    assert state["averaged"] == 5
    key = "net.body.1.running_mean"
    assert not torch.equal(state["sets"]["seg"][key], state["current_sets"]["seg"][key])
    # Another fit begins anew.
    fit(ByStep(), batches_of(TASKS), EMAWeightAveraging(decay=0.5), tasks)
    assert "_swap_models" not in vars(average)
