"""Batches whose samples belong to several tasks, told by a key of the batch, in real fits."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_bn
from lightning_bn import BatchNormFreezer, PreciseBatchNorm
from tests.callbacks.fits import quiet
from tests.callbacks.task_fits import TASKS, TasksModule, batch_of, callback, fit, loader_of, norms, sets
from tests.models import bits

SPLITS = [[5, 2, 3], [4, 6, 0], [0, 2, 2], [7, 0, 0]]


def mixed(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Batches in which the samples of the tasks lie in any order, in other numbers each time."""
    batches = []
    for index in range(count):
        parts = [
            batch_of(task, seed + 10 * index + at, size)
            for at, (task, size) in enumerate(zip(TASKS, SPLITS[index % len(SPLITS)], strict=True))
        ]
        order = torch.randperm(sum(len(part["x"]) for part in parts), generator=torch.Generator().manual_seed(index))
        labels = [part["task"] for part in parts for _ in part["x"]]
        batches.append(
            {
                "x": torch.cat([part["x"] for part in parts])[order],
                "y": torch.cat([part["y"] for part in parts])[order],
                "task": [labels[row] for row in order.tolist()],
            }
        )
    return batches


def rows_of(batch: dict[str, Any], task: str) -> torch.Tensor:
    return batch["x"][[one == task for one in batch["task"]]]


class Separate(pl.Callback):
    """A copy of the network for each task, fed the same weights and that task's rows."""

    def __init__(self) -> None:
        self.nets: dict[str, nn.Module] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for task in TASKS:
            net = self.nets.setdefault(task, copy.deepcopy(pl_module.net))
            for mine, other in zip(net.parameters(), pl_module.net.parameters(), strict=True):
                mine.data.copy_(other.data)
            if len(x := rows_of(batch, task)):
                with torch.no_grad():
                    net.train()(x)


def test_each_task_has_what_its_own_rows_give() -> None:
    oracle, tasks = Separate(), callback()
    fit(TasksModule(), mixed(60), oracle, tasks)
    for task, layers in tasks.bank.parts():
        for name, layer in norms(oracle.nets[task]).items():
            for key, buffer in layer.named_buffers():
                torch.testing.assert_close(layers[f"net.{name}"][key], buffer, rtol=1e-12, atol=1e-12)


def test_evaluation_uses_each_rows_own() -> None:
    module, tasks = TasksModule(), callback()
    fit(module, mixed(8), tasks)
    batch = mixed(1, seed=500)[0]
    quiet(callbacks=[tasks]).validate(module, loader_of([batch]), verbose=False)
    found = torch.frombuffer(bytearray(module.put_out[0]), dtype=torch.float64).view(-1, 2)
    for task in TASKS:
        with tasks.bank.task(task):
            expected = module.eval().net(rows_of(batch, task))
        torch.testing.assert_close(found[[one == task for one in batch["task"]]], expected, rtol=1e-12, atol=1e-12)


def test_frozen_layer_uses_each_rows_own_and_stays() -> None:
    module, tasks = TasksModule(initial=False), callback()
    freezer = BatchNormFreezer(["body.1"], root="net")
    fit(module, mixed(4), tasks, freezer)
    assert freezer.report.identical
    assert not freezer.report.violations


def test_afterwards_and_after_an_exception_the_layers_are_what_they_were() -> None:
    class Fails(TasksModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                raise RuntimeError("as planned")
            return super().training_step(batch, batch_idx)

    module = Fails()
    before = {name: (type(layer), layer.running_mean, dict(vars(layer))) for name, layer in norms(module).items()}
    with pytest.raises(RuntimeError, match="as planned"):
        fit(module, mixed(3), callback())
    for name, (kind, mean, attributes) in before.items():
        layer = norms(module)[name]
        assert type(layer) is kind
        assert layer.running_mean is mean
        assert [*vars(layer)] == [*attributes]


def test_what_does_not_go_together_is_refused_by_name() -> None:
    class Context(TasksModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with lightning_bn.task("seg"):
                return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="task 'seg' begins inside a context of rows of several tasks"):
        fit(Context(), mixed(1), callback())
    with pytest.raises(MisconfigurationException, match=r"there is no task 'sag'; the tasks are 'det'"):
        fit(TasksModule(), [{**batch_of("det", 0), "task": ["det", "sag"] * 4}], callback())
    with pytest.raises(MisconfigurationException, match=r"tasks \['None', 'det'\]\. .*a task for each sample"):
        fit(TasksModule(), [{**batch_of("det", 0), "task": ["det", None] * 4}], callback())
    with pytest.raises(ValueError, match=r"got 8 rows, but rows\(\) names the tasks of 4"):
        fit(TasksModule(), [{**batch_of("det", 0), "task": ["det", "seg"] * 2}], callback())
    with pytest.raises(MisconfigurationException, match=r"one batch holds the tasks .*Each batch must be of one task"):
        fit(TasksModule(), mixed(3), callback(), PreciseBatchNorm(), val=[mixed(1)])
    freezer = BatchNormFreezer(root="net", by_task={"seg": ["body.1"]}, task_key="task")
    with pytest.raises(MisconfigurationException, match=r"one batch holds the tasks .*Each batch must be of one task"):
        fit(TasksModule(initial=False), mixed(3), callback(), freezer)


def test_rows_by_hand_inside_a_step_tell_the_task() -> None:
    class ByHand(TasksModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with tasks.bank.rows(batch["task"]):
                return super().training_step({"x": batch["x"], "y": batch["y"]}, batch_idx)

    tasks, keyed = callback(task_key=None), callback()
    with pytest.warns(UserWarning, match="tasks names"):  # it is not told of these
        fit(ByHand(), mixed(6), tasks)
    fit(TasksModule(), mixed(6), keyed)
    assert sets(tasks.bank) == sets(keyed.bank)


def test_predicted_rows_are_those_of_the_keyed_batch(tmp_path: Any) -> None:
    trainer = fit(TasksModule(), mixed(6), callback())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    batch = mixed(1, seed=500)[0]
    found = [
        bits(out)
        for _ in range(2)
        for outs in quiet(callbacks=[callback()]).predict(
            TasksModule(), loader_of([batch]), ckpt_path=tmp_path / "c.ckpt"
        )
        or []
        for out in outs
    ]
    assert len(found) == 2
    assert found[0] == found[1]
