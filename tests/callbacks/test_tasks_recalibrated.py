"""Precise statistics of every task in a fit: of its own batches, and replaced by the moving average afterwards."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_bn import BatchNormFreezer, PreciseBatchNorm
from lightning_bn.functional import recalibrate
from tests.callbacks.task_fits import TASKS, TasksModule, batches_of, callback, fit, norms, sets, trained
from tests.callbacks.test_tasks import joint
from tests.models import bits

ORDERS = {
    "alternating": batches_of(TASKS * 4),
    "joint": joint(4),
    "nine to one": batches_of((["det"] * 9 + ["seg"]) * 2),
}


class Look(pl.Callback):
    """What every task holds, and the weights, right after the recalibration and in the next training batch."""

    def __init__(self, tasks: Any) -> None:
        self.tasks, self.found, self.average = tasks, dict[str, bytes](), dict[str, bytes]()
        self.net: Any = None

    def on_validation_start(self, *args: Any) -> None:
        self.average = self.average or sets(self.tasks.bank)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.net is None:
            self.net, self.found = copy.deepcopy(pl_module.net), sets(self.tasks.bank)


def of_task(batches: list[Any], task: str) -> list[Any]:
    if "x" in batches[0]:
        return [batch["x"] for batch in batches if batch["task"] == task]
    return [batch[task]["x"] for batch in batches if batch[task] is not None]


@pytest.mark.filterwarnings("ignore:TaskBatchNorm. tasks names")
@pytest.mark.parametrize("order", ORDERS)
def test_each_tasks_statistics_are_of_its_own_batches(order: str) -> None:
    batches = ORDERS[order]
    tasks = callback(task_key=None if order == "joint" else "task")
    look, precise = Look(tasks), PreciseBatchNorm(num_batches=20)
    fit(TasksModule(), batches, tasks, precise, look, val=[batches[:2]], num_sanity_val_steps=0)
    for task in TASKS:
        own = of_task(batches, task)
        if not own:
            assert not precise.last.tasks[task].layers
            continue
        net = copy.deepcopy(look.net).train()
        recalibrate(net, own)
        for name, layer in norms(net).items():
            for key in ("running_mean", "running_var"):
                found = torch.frombuffer(bytearray(look.found[f"{task}/net.{name}.{key}"]), dtype=torch.float64)
                assert torch.allclose(found, getattr(layer, key), rtol=1e-9, atol=1e-12)
        assert precise.last.tasks[task].num_batches == len(own)


def test_training_is_as_it_was_and_the_average_comes_back() -> None:
    class Noting(TasksModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # after those of all callbacks
            if self.trainer.current_epoch and not batch_idx:
                after.update(sets(tasks.bank))

    after: dict[str, bytes] = {}
    batches = ORDERS["alternating"]
    tasks, precise = callback(), PreciseBatchNorm(num_batches=20, restore=True)
    look = Look(tasks)
    options = {"val": [batches[:2]], "num_sanity_val_steps": 0, "max_epochs": 2}
    module, weights = trained(Noting, batches, tasks, precise, look, **options)
    plain, same = trained(TasksModule, batches, **options)
    assert weights == same
    assert module.losses == plain.losses
    assert look.average != look.found
    assert after == look.average


def test_frozen_layer_normalizes_with_the_tasks_own_set() -> None:
    batches = ORDERS["alternating"]
    tasks, precise = callback(), PreciseBatchNorm(num_batches=20)
    freezer, look = BatchNormFreezer(["body.1"], root="net"), Look(tasks)
    module = TasksModule(initial=False)

    class Shift(pl.Callback):
        def on_fit_start(self, *args: Any) -> None:
            for at, (_, layers) in enumerate(tasks.bank.parts()):
                layers["net.body.1"]["running_mean"] += at

    fit(module, batches, tasks, Shift(), freezer, precise, look, val=[batches[:1]], num_sanity_val_steps=0)
    for task in TASKS:
        net = copy.deepcopy(look.net)
        mean = torch.frombuffer(bytearray(look.found[f"{task}/net.body.1.running_mean"]), dtype=torch.float64)
        net.body[1].running_mean.copy_(mean)
        net.train().body[1].eval()
        recalibrate(net, of_task(batches, task), modules=["body.4"])
        found = torch.frombuffer(bytearray(look.found[f"{task}/net.body.4.running_mean"]), dtype=torch.float64)
        assert torch.allclose(found, net.body[4].running_mean, rtol=1e-9)
    assert freezer.report.identical


def test_log_line_and_curves_name_every_task(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(TasksModule(), ORDERS["alternating"], callback(), PreciseBatchNorm(), val=[ORDERS["alternating"][:1]])
    assert "'det' from 32 samples, standard error" in caplog.text
    assert "'depth' from 32 samples" in caplog.text


def test_bits_of_a_task_that_has_no_batch_are_kept() -> None:
    tasks, precise = callback(), PreciseBatchNorm()
    look = Look(tasks)
    with pytest.warns(UserWarning, match="names 'depth'"):
        fit(TasksModule(), batches_of(["det", "seg"] * 3), tasks, precise, look, val=[batches_of(["det"])])
    kept = {key: value for key, value in look.average.items() if key.startswith("depth/")}
    assert kept
    assert kept.items() <= look.found.items()
    assert bits(torch.zeros(4, dtype=torch.float64)) == look.found["depth/net.body.1.running_mean"]


def test_limits_hold_for_each_task() -> None:
    tasks, precise = callback(tasks=["det", "seg"]), PreciseBatchNorm(num_batches=2)
    batches = batches_of((["det"] * 9 + ["seg"]) * 2)
    fit(TasksModule(), batches, tasks, precise, val=[batches[:2]], num_sanity_val_steps=0)
    assert {task: one.num_batches for task, one in precise.last.tasks.items()} == {"det": 2, "seg": 2}
