"""Statistics per task in real fits: each task has what a network of its own would have, and training is as it was."""

import copy
import csv
import pickle
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.checkpoint import checkpoint

import lightning_bn
from lightning_bn import BatchNormFreezer, TaskBatchNorm
from lightning_bn.functional import RecomputationError, SelectionError, task_statistics
from tests.callbacks.fits import quiet
from tests.callbacks.task_fits import (
    LAYERS,
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
    trained,
)
from tests.models import bits

ORDERS = {
    "alternating": TASKS * 20,
    "in sequence": [task for task in TASKS for _ in range(20)],
    "nine to one": [["seg", "depth"][index % 20 == 19] if index % 10 == 9 else "det" for index in range(60)],
}

unseen = pytest.mark.filterwarnings("ignore:TaskBatchNorm. tasks names")


# What each task has


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("in_contexts", [False, True])
def test_each_task_has_what_a_network_of_its_own_would_have(order: str, in_contexts: bool) -> None:
    batches, oracle = batches_of(ORDERS[order]), SeparateStatistics()
    tasks = callback(task_key=None if in_contexts else "task")
    fit(TasksModule(in_contexts), batches, oracle, tasks)
    assert sets(tasks.bank) == oracle.sets()


def joint(count: int, without: str | None = None) -> list[Any]:
    parts = [{task: batch_of(task, 10 * index + at) for at, task in enumerate(TASKS)} for index in range(count)]
    return [
        {task: None if task == without and index % 2 else part for task, part in batch.items()}
        for index, batch in enumerate(parts)
    ]


@pytest.mark.parametrize("without", [None, "depth"])
def test_joint_steps_have_it_too(without: str | None) -> None:
    oracle, tasks = SeparateStatistics(), callback(task_key=None)
    fit(TasksModule(), joint(20, without), oracle, tasks)
    assert sets(tasks.bank) == oracle.sets()


@pytest.mark.parametrize("batches", [batches_of(ORDERS["alternating"]), joint(20)], ids=["alternating", "joint"])
def test_training_is_as_it_was(batches: list[Any]) -> None:
    plain, weights = trained(TasksModule, batches, val=[batches[:2]])
    with_sets, same = trained(
        TasksModule, batches, callback(task_key="task" if "x" in batches[0] else None), val=[batches[:2]]
    )
    assert plain.losses == with_sets.losses
    assert weights == same


def test_one_task_changes_nothing_of_the_checkpoint(tmp_path: Any) -> None:
    files = []
    for index, callbacks in enumerate(([], [callback(tasks=["det"])])):
        pl.seed_everything(3, verbose=False)
        trainer = fit(TasksModule(), batches_of(["det"] * 6), *callbacks, val=[batches_of(["det"] * 2)])
        trainer.save_checkpoint(tmp_path / f"{index}.ckpt")
        files.append(torch.load(tmp_path / f"{index}.ckpt", weights_only=True))
    assert [*files[1]["callbacks"]] == ["TaskBatchNorm"]
    plain, one = ({**file, "callbacks": {}} for file in files)
    assert same(plain, one)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return bits(one) == bits(other)
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_validation_uses_each_tasks_own(tmp_path: Any) -> None:
    oracle, tasks, module = SeparateStatistics(), callback(), TasksModule()
    val = [batches_of(["seg", "det"], seed=90), batches_of(["depth"], seed=95)]
    trainer = fit(module, batches_of(TASKS * 5), oracle, tasks, val=val, num_sanity_val_steps=0)

    def expected() -> list[bytes]:
        found = []
        for batch in [*val[0], *val[1]]:
            net = oracle.nets[batch["task"]].eval()
            net.load_state_dict({**module.net.state_dict(), **dict(net.named_buffers())})
            found.append(bits(net(batch["x"])))
        return found

    assert module.put_out == expected()
    # The sets live on in the callback, and in a file.
    module.put_out.clear()
    trainer.validate(module, [loader_of(each) for each in val], verbose=False)
    trainer.test(module, [loader_of(each) for each in val], verbose=False)
    assert module.put_out == expected() * 2
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    fresh = TasksModule()
    listed = callback(task_key=None, val_tasks={"test": ["seg", "depth"]})
    other = [batches_of(["seg"], seed=90), batches_of(["depth"], seed=95)]
    quiet(callbacks=[listed]).test(fresh, [loader_of(each) for each in other], tmp_path / "c.ckpt", verbose=False)
    assert fresh.put_out == [expected()[0], expected()[2]]
    predictions = quiet(callbacks=[callback()]).predict(TasksModule(), loader_of(val[0]), ckpt_path=tmp_path / "c.ckpt")
    assert [bits(out) for batch in predictions or [] for out in batch] == expected()[:2]


def test_context_inside_a_step_counts_more_than_the_batchs_key() -> None:
    class Both(TasksModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with lightning_bn.task("seg"):
                self.net(batch["x"])
            return super().training_step(batch, batch_idx)

    tasks = callback()
    fit(Both(), batches_of(["det", "det", "det", "depth"]), tasks)
    counts = {task: int(layers["net.body.1"]["num_batches_tracked"]) for task, layers in tasks.bank.parts()}
    assert counts == {"det": 3, "seg": 4, "depth": 1}


# Outside of contexts, and around the run


def test_layers_hold_their_own_objects_between_batches_and_afterwards() -> None:
    module, seen = TasksModule(), []
    own = {name: layer.running_mean for name, layer in norms(module).items()}

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(all(norms(module)[name].running_mean is mean for name, mean in own.items()))

        on_validation_epoch_end = on_train_batch_end

    fit(module, batches_of(TASKS), Look(), callback(), val=[batches_of(TASKS)])
    assert seen == [True] * 5
    assert all(norms(module)[name].running_mean is mean for name, mean in own.items())


class Stop(pl.Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.stop)

    def stop(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("as planned")


@pytest.mark.parametrize(
    "hook", ["on_after_backward", "on_train_batch_start", "on_validation_batch_start", "on_train_batch_end"]
)
def test_after_an_exception_the_layers_hold_their_own_objects(hook: str) -> None:
    module, tasks = TasksModule(initial=False), callback()
    own = {name: layer.running_mean for name, layer in norms(module).items()}
    freezer = BatchNormFreezer(root="net", by_task={"seg": ["body.1"]}, task_key="task")
    with pytest.raises(RuntimeError, match=r"as planned"):
        fit(module, batches_of(["seg", "det"]), tasks, freezer, Stop(hook), val=[batches_of(["seg"])])
    assert all(norms(module)[name].running_mean is mean for name, mean in own.items())
    assert not any(layer._forward_pre_hooks for layer in norms(module).values())
    fit(TasksModule(), batches_of(["seg", "det"]), callback(tasks=["det", "seg"]))
    fit(module.train(), batches_of(TASKS), callback())


def test_exception_inside_a_context_inside_a_validation() -> None:
    class Fails(TasksModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            with lightning_bn.task("seg"):
                raise RuntimeError("as planned")

    module = Fails()
    own = {name: layer.running_mean for name, layer in norms(module).items()}
    with pytest.raises(RuntimeError, match=r"as planned"):
        fit(module, batches_of(["det"]), callback(), val=[batches_of(["det"])])
    assert all(norms(module)[name].running_mean is mean for name, mean in own.items())
    with lightning_bn.task("nobody listens"):
        pass


@unseen
def test_batch_that_a_hook_skipped_leaves_nothing_behind() -> None:
    class Skips(TasksModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch["task"] == "seg" else None

    tasks, module = callback(), Skips()
    own = norms(module)["net.body.1"].running_mean
    before = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, *args: Any) -> None:
            before.append(norms(module)["net.body.1"].running_mean is own)

    fit(module, batches_of(["det", "det", "seg"]), tasks, Look())
    assert before == [True]
    assert {int(one["net.body.1"]["num_batches_tracked"]) for _, one in tasks.bank.parts()} == {0, 2}


def test_freezer_and_statistics_per_task_in_either_order() -> None:
    for order in (1, -1):
        module = TasksModule(initial=False)
        before = {key: bits(buffer) for key, buffer in module.net.body[1].named_buffers()}
        freezer = BatchNormFreezer(root="net", by_task={"seg": ["body.1"]}, task_key="task")
        tasks = callback()
        oracle = SeparateStatistics()
        fit(module, batches_of(TASKS * 4), *[tasks, freezer][::order], oracle)
        assert freezer.report is not None
        assert freezer.report.identical
        assert freezer.report.task_batches == 4
        found, expected = sets(tasks.bank), oracle.sets()
        # Frozen for seg, so that it holds what it began with; the first layer of all, so that its input is the same.
        frozen = [key for key in found if key.startswith("seg/net.body.1")]
        assert all(found[f"seg/net.body.1.{key}"] == value for key, value in before.items())
        assert {key: found[key] for key in found if key not in frozen and "net.body.1" in key} == {
            key: expected[key] for key in found if key not in frozen and "net.body.1" in key
        }


def test_frozen_in_every_batch_all_tasks_sets_are_proven() -> None:
    class Writes(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                dict(tasks.bank.parts())["seg"]["net.body.1"]["running_mean"] += 1

    tasks, freezer, module = callback(), BatchNormFreezer(["body"], root="net"), TasksModule(initial=False)
    before = {key: bits(buffer) for key, buffer in module.net.body[1].named_buffers()}
    with pytest.warns(UserWarning, match=r"net.body.1 .running_mean of task 'seg' by up to 1"):
        fit(module, batches_of(TASKS * 3), tasks, freezer, Writes())
    assert not freezer.report.identical
    assert all(sets(tasks.bank)[f"seg/net.body.1.{key}"] == value for key, value in before.items())
    clean = BatchNormFreezer(["body"], root="net")
    fit(TasksModule(initial=False), batches_of(TASKS * 3), callback(), clean)
    assert clean.report.identical


# Nothing tells the task


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_batch_of_which_nothing_tells_the_task_is_an_error_in_each_stage(stage: str) -> None:
    loader = loader_of(batches_of([None] * 3))
    trainer = quiet(callbacks=[callback(task_key=None)], max_epochs=1)
    with pytest.raises(
        MisconfigurationException, match=r"it is not known which task a batch belongs to .*'net\.body\.1'.*unlabelled="
    ):
        getattr(trainer, stage)(TasksModule(), loader, *([loader] if stage == "fit" else []))


@unseen
def test_unlabelled_batches_may_be_given_a_task() -> None:
    tasks, module = callback(unlabelled="seg"), TasksModule()
    fit(module, batches_of(["det", None, None]), tasks, val=[batches_of([None])])
    assert {task: int(one["net.body.1"]["num_batches_tracked"]) for task, one in tasks.bank.parts()} == {
        "det": 1,
        "seg": 2,
        "depth": 0,
    }


def test_forward_outside_of_contexts_while_they_are_used_is_told_once() -> None:
    class Outside(TasksModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net.body(batch["x"])
            return super().training_step(batch, batch_idx)

    tasks = callback(task_key=None)
    with pytest.warns(
        UserWarning, match=r"default task 'det' in BatchNorm layer 'net\.body\.1', 'net\.body\.4'"
    ) as all_:
        fit(Outside(in_contexts=True), batches_of(TASKS * 2), tasks)
    assert len([one for one in all_ if "outside of any" in str(one.message)]) == 1


def test_unknown_task_is_named_with_batch_and_those_that_there_are() -> None:
    message = r"batch 1: there is no task 'sag'; the tasks are 'det', .*Closest: 'seg'"
    with pytest.raises(MisconfigurationException, match=message):
        fit(TasksModule(), batches_of(["det", "sag"]), callback())


def test_task_that_no_batch_of_the_first_epoch_had_is_told_once() -> None:
    with pytest.warns(UserWarning, match=r"names 'depth', but no batch in epoch 0.*seen: 'det', 'seg'") as told:
        fit(TasksModule(), batches_of(["det", "seg"]), callback(), max_epochs=3)
    assert len([one for one in told if "tasks names" in str(one.message)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "no task is given"),
        ({"tasks": ["a", "a"]}, "'a' is given twice"),
        ({"tasks": ["mixture"]}, "is not a name of a task"),
        ({"default": "deth"}, "default='deth'"),
        ({"start": "slow"}, "start='slow'"),
        ({"unlabelled": "none"}, "unlabelled='none'"),
        ({"val_tasks": ["det", "sag"]}, "'sag'"),
        ({"val_tasks": {"valid": ["det"]}}, "'valid'"),
        ({"val_tasks": "det"}, "one name for each loader"),
        ({"task_key": "no.such.function"}, "task_key='no.such.function'"),
        ({"merge": "yes"}, "merge='yes'"),
    ],
)
def test_arguments_are_looked_at(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        callback(**arguments)


def test_val_tasks_of_another_length_than_the_loaders() -> None:
    with pytest.raises(MisconfigurationException, match=r"2 tasks for val .det, seg., but there is 1 loader"):
        fit(TasksModule(), batches_of(["det"]), callback(val_tasks=["det", "seg"]), val=[batches_of(["det"])])


def test_two_callbacks_over_one_layer() -> None:
    with pytest.raises(RuntimeError, match=r"'net.body.1'.*has statistics per task already"):
        fit(TasksModule(), batches_of(["det"]), callback(name="one"), callback(name="two", modules=["net.body"]))
    with pytest.raises(MisconfigurationException, match=r"have the name"):
        fit(TasksModule(), batches_of(["det"]), callback(name="one"), callback(name="one"))
    with pytest.raises(SelectionError, match=r"net.neck"):
        fit(TasksModule(), batches_of(["det"]), callback(modules=["net.neck"]))


def test_two_callbacks_over_different_layers() -> None:
    body, head = callback(name="body", modules=["net.body"]), callback(name="head", modules=["net.head"])
    oracle = SeparateStatistics()
    fit(TasksModule(), batches_of(TASKS * 4), body, oracle, head)
    assert sets(body.bank) | sets(head.bank) == oracle.sets()


# Activation checkpointing


class CheckpointedTasks(TasksModule):
    """Its body runs again in the backward."""

    def outputs(self, batch: dict[str, Any]) -> list[Any]:
        found = []
        for task, part in self.parts(batch):
            x = part["x"].requires_grad_()
            if task is None:
                found.append((self.net.head(checkpoint(self.net.body, x, use_reentrant=False)), part["y"]))
            else:
                with lightning_bn.task(task):
                    found.append((self.net.head(checkpoint(self.net.body, x, use_reentrant=False)), part["y"]))
        return found


def test_checkpointed_forward_of_a_labelled_batch_moves_its_own_tasks_statistics() -> None:
    tasks = callback(modules=["net.body"])
    fit(CheckpointedTasks(), batches_of(TASKS * 2), tasks)
    # Once in the forward and once more in the backward, as without us.
    assert {int(one["net.body.1"]["num_batches_tracked"]) for _, one in tasks.bank.parts()} == {4}


def test_checkpointed_forward_across_a_context_is_an_error() -> None:
    with pytest.raises(RecomputationError, match=r"'net\.body\..'.*Call the backward inside the context"):
        fit(CheckpointedTasks(), joint(2), callback(task_key=None))


def test_backward_inside_the_context_is_right() -> None:
    class Inside(CheckpointedTasks):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for task, part in batch.items():
                with lightning_bn.task(task):
                    out = self.net.head(checkpoint(self.net.body, part["x"].requires_grad_(), use_reentrant=False))
                    self.manual_backward(torch.nn.functional.cross_entropy(out, part["y"]))
            optimizer.step()

    tasks = callback(task_key=None)
    fit(Inside(), joint(3), tasks)
    assert {int(one["net.body.1"]["num_batches_tracked"]) for _, one in tasks.bank.parts()} == {6}


# Checkpoints


class ByStep(TasksModule):
    """What a batch holds follows from the step: a loader that is iterated anew after a resume gives the same ones."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        step = self.trainer.global_step
        return batch_of(TASKS[step % 3], step) if self.trainer.training else batch


class Save(pl.Callback):
    def __init__(self, path: Any, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def straight_and_resumed(path: Any, steps: int, make: Any = callback, beside: Any = list, **options: Any) -> list[Any]:
    """What a fit of two epochs ends with, and what one ends with that is resumed from where it was after some steps."""
    ends = []
    for resumed in (False, True):
        pl.seed_everything(3, verbose=False)
        module, tasks = ByStep(), make()
        settings = {"max_epochs": 2, "val": [batches_of(TASKS, seed=50)], "num_sanity_val_steps": 0, **options}
        if resumed:
            settings["ckpt_path"] = path
        others = [*beside(), *([] if resumed else [Save(path, steps)])]
        fit(module, batches_of(TASKS * 3), tasks, *others, **settings)
        ends.append((sets(tasks.bank), [bits(parameter) for parameter in module.parameters()], module.put_out[-3:]))
    return ends


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("start", ["shared", "cumulative"])
@pytest.mark.parametrize("steps", [9, 4])
def test_resumed_is_the_uninterrupted_run_bit_for_bit(tmp_path: Any, steps: int, start: str) -> None:
    straight, resumed = straight_and_resumed(tmp_path / "c.ckpt", steps, lambda: callback(start=start))
    assert straight == resumed


def saved(path: Any, **arguments: Any) -> Any:
    tasks = callback(**arguments)
    trainer = fit(TasksModule(), batches_of(TASKS * 3), tasks)
    trainer.save_checkpoint(path)
    return tasks


def resume(path: Any, **arguments: Any) -> Any:
    tasks = callback(**arguments)
    fit(TasksModule(), batches_of(TASKS), tasks, ckpt_path=path, max_epochs=1)
    return tasks


def test_state_is_tensors_and_plain_values(tmp_path: Any) -> None:
    saved(tmp_path / "c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"]["TaskBatchNorm"]
    assert state["tasks"] == TASKS
    assert sorted(state["sets"]) == ["depth", "seg"]
    assert state["layers"] == list(LAYERS)


def test_task_fewer_task_more_and_another_default(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = saved(tmp_path / "c.ckpt")
    with pytest.raises(MisconfigurationException, match=r"task 'depth', but tasks has only det, seg.*given_up"):
        resume(tmp_path / "c.ckpt", tasks=["det", "seg"])
    with pytest.raises(MisconfigurationException, match=r"'seg', but tasks has only det, depth, mask"):
        resume(tmp_path / "c.ckpt", tasks=["det", "depth", "mask"])
    fewer = resume(tmp_path / "c.ckpt", tasks=["det", "seg"], given_up=["depth"])
    assert sets(fewer.bank).items() <= sets(first.bank).items()
    with caplog.at_level("INFO"):
        more = resume(tmp_path / "c.ckpt", tasks=[*TASKS, "mask"])
        swapped = resume(tmp_path / "c.ckpt", default="seg")
    assert sets(first.bank).items() <= sets(more.bank).items()
    assert "task 'mask' is new" in caplog.text
    assert "the default task was 'det' when this was saved, and is 'seg' now" in caplog.text
    assert sets(swapped.bank) == sets(first.bank)


def test_checkpoint_without_sets_starts_all_tasks_from_its_statistics(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module = TasksModule()
    fit(module, batches_of(["det"] * 3)).save_checkpoint(tmp_path / "c.ckpt")
    with caplog.at_level("INFO"):
        tasks = resume(tmp_path / "c.ckpt")
    assert "no statistics per task: 'det', 'seg', 'depth' all start with the running statistics of" in caplog.text
    means = {bits(one["net.body.1"]["running_mean"]) for _, one in tasks.bank.parts()}
    assert means == {bits(module.net.body[1].running_mean)}


def test_other_layers_in_the_checkpoint_are_an_error(tmp_path: Any) -> None:
    saved(tmp_path / "c.ckpt")
    with pytest.raises(MisconfigurationException, match=r"only in the file: 'net.head.0'"):
        resume(tmp_path / "c.ckpt", modules=["net.body"])


def test_evaluation_without_any_sets_uses_the_models_own_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module, plain = TasksModule(), TasksModule()
    with caplog.at_level("INFO"):
        trainer = quiet(callbacks=[callback()])
        for _ in range(2):
            trainer.validate(module, loader_of(batches_of(TASKS)), verbose=False)
    quiet().validate(plain, loader_of(batches_of(TASKS)), verbose=False)
    assert module.put_out == plain.put_out * 2
    assert caplog.text.count("there are no statistics per task yet") == 1


# The Trainer's other ways to run


@pytest.mark.parametrize("options", [{"barebones": True}, {"fast_dev_run": 2}])
def test_barebones_and_fast_dev_run(options: dict[str, Any]) -> None:
    tasks, module = callback(tasks=["det", "seg"]), TasksModule()
    settings = {**options, "callbacks": [tasks]}
    trainer = pl.Trainer(accelerator="cpu", **settings) if "barebones" in options else quiet(**settings)
    if "barebones" in options:
        trainer.fit_loop.max_epochs = 1
    trainer.fit(module, loader_of(batches_of(["det", "seg"])), loader_of(batches_of(["det"])))
    assert {int(one["net.body.1"]["num_batches_tracked"]) for _, one in tasks.bank.parts()} == {1}


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_combined_loaders_whose_tasks_end_at_different_batches(mode: str) -> None:
    loaders = {task: loader_of(batches_of([task] * (2 + 2 * at))) for at, task in enumerate(TASKS)}
    combined = pl.utilities.CombinedLoader(loaders, mode)
    oracle, tasks = SeparateStatistics(), callback(task_key=None)
    quiet(max_epochs=1, callbacks=[oracle, tasks], limit_val_batches=0).fit(TasksModule(), combined, loader_of([]))
    assert sets(tasks.bank) == oracle.sets()


def test_matrix_is_logged_and_said(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    tasks = callback()
    with caplog.at_level("INFO"):
        fit(TasksModule(), batches_of(TASKS * 10), tasks, logger=logger, max_epochs=2)
    assert "lie furthest apart at net.body.1" in caplog.text
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curve = [float(row["bn/task_drift_max"]) for row in rows if row["bn/task_drift_max"]]
    assert len(curve) == 2
    assert curve[-1] == pytest.approx(tasks.drift().worst()[-1])
    assert tasks.drift().worst()[0] == "net.body.1"


def test_drift_before_a_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"no statistics yet"):
        callback().drift()


def test_released_and_given_to_the_ground_floor() -> None:
    module, tasks = TasksModule(), callback()
    fit(module, batches_of(TASKS * 3), tasks)
    kept = dict(tasks.bank.parts())["seg"]["net.body.1"]["running_mean"].clone()
    tasks.bank.release(keep="seg")
    assert torch.equal(module.net.body[1].running_mean, kept)
    task_statistics(module, TASKS)


def test_names_reach_the_package() -> None:
    assert lightning_bn.TaskBatchNorm is TaskBatchNorm


# What a review found


def losses(*callbacks: pl.Callback, **options: Any) -> list[float]:
    module = TasksModule(initial=False)
    fit(module, batches_of(TASKS * 6), *callbacks, **options)
    return [torch.frombuffer(bytearray(each), dtype=torch.float64).item() for each in module.losses]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("options", [{"by_task": {"seg": ["body.1"]}, "task_key": "task"}, {"modules": ["body.1"]}])
def test_layer_that_is_frozen_before_its_task_has_seen_anything_normalizes_with_the_defaults(
    order: int, options: dict[str, Any]
) -> None:
    freezer = BatchNormFreezer(root="net", **options)
    found = losses(*[callback(start="cumulative"), freezer][::order])
    assert max(found) < 5
    assert freezer.report.identical
    late = BatchNormFreezer(["body.1"], root="net", start_step=1)
    assert max(losses(callback(start="cumulative"), late)) < 5
    assert late.report.identical


def test_forward_in_eval_inside_a_context_that_begins_sees_the_average_so_far() -> None:
    model = TasksModule().net
    bank = task_statistics(model, ["old", "new"])
    x = batch_of("seg", 1)["x"]
    with bank.task("new"):
        model.eval()
        before = model(x)
        model.train()
        model(x)
        model.eval()
        after = model.body[0:2](x)
    assert torch.isfinite(before).all()
    assert before.abs().max() < 10
    # One batch so far: it is normalized with its own statistics, but for the unbiased variance.
    assert after.mean(0).abs().max() < 1e-9
    assert torch.allclose(after.var(0), torch.ones(4, dtype=torch.float64), rtol=1e-3)


def test_saved_inside_a_context_that_begins() -> None:
    model = TasksModule().net
    bank = task_statistics(model, ["old", "new"])
    with bank.task("new"):
        empty = bank.state_dict()["sets"]["new"]["body.1.running_var"].clone()
        model(batch_of("seg", 1)["x"])
        inside = bank.state_dict()["sets"]["new"]["body.1.running_mean"].clone()
    assert torch.equal(empty, torch.ones(4, dtype=torch.float64))
    assert torch.equal(inside, bank.snapshot("new").mean[:4])


def test_validated_and_then_fitted(tmp_path: Any) -> None:
    for start in ("shared", "cumulative"):
        tasks, module = callback(start=start), TasksModule()
        trainer = quiet(callbacks=[tasks], max_epochs=1, limit_val_batches=1)
        trainer.validate(module, loader_of(batches_of(["seg"])), verbose=False)
        trainer.fit(module.train(), loader_of(batches_of(TASKS)), loader_of(batches_of(["seg"])))
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        trainer.validate(module, loader_of(batches_of(["seg"])), ckpt_path=tmp_path / "c.ckpt", verbose=False)
        straight = callback(start=start)
        fit(TasksModule(), batches_of(TASKS), straight)
        assert sets(tasks.bank) == sets(straight.bank)


def test_another_model_and_other_values_are_not_evaluated_with_stale_statistics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks, val = callback(), loader_of(batches_of(["seg"]))
    trainer = quiet(callbacks=[tasks], max_epochs=1, limit_val_batches=1)
    module, other = TasksModule(), TasksModule(initial=False)
    trainer.validate(module, val, verbose=False)
    module.load_state_dict(other.state_dict())
    module.put_out.clear()
    trainer.validate(module, val, verbose=False)
    assert module.put_out == [bits(other.eval().net(batch_of("seg", 0)["x"]))]
    trainer.fit(module.train(), loader_of(batches_of(TASKS)), val)
    caplog.clear()
    tasks._told_of_none = False
    with caplog.at_level("INFO"):
        trainer.validate(TasksModule(), val, verbose=False)
    assert "there are no statistics per task yet" in caplog.text


def test_default_that_is_new_on_resume_goes_on_as_it_is(tmp_path: Any) -> None:
    first = saved(tmp_path / "c.ckpt", start="cumulative")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        renamed = resume(tmp_path / "c.ckpt", tasks=["cls", "seg", "depth"], given_up=["det"], start="cumulative")
    before, after = dict(first.bank.parts()), dict(renamed.bank.parts())
    assert torch.equal(before["det"]["net.body.1"]["running_mean"], after["cls"]["net.body.1"]["running_mean"])
    assert "cls" not in renamed.bank.state_dict()["beginning"]
    with renamed.bank.task("seg"):
        pass


def test_label_that_is_none_tells_nothing() -> None:
    tasks = callback(tasks=["det", "seg"], unlabelled="seg")
    batches = [*batches_of(["det"]), {**batch_of(None, 1), "task": None}, {**batch_of(None, 2), "task": [None] * 8}]
    fit(TasksModule(), batches, tasks)
    assert {task: int(one["net.body.1"]["num_batches_tracked"]) for task, one in tasks.bank.parts()} == {
        "det": 1,
        "seg": 2,
    }
    with pytest.raises(MisconfigurationException, match="it is not known which task a batch belongs to"):
        fit(TasksModule(), batches[1:], callback())


def test_callback_can_be_pickled_after_a_run() -> None:
    tasks = callback()
    fit(TasksModule(), batches_of(TASKS), tasks)
    assert sets(pickle.loads(pickle.dumps(tasks)).bank) == sets(tasks.bank)


def test_task_that_is_given_up_is_none_of_the_tasks() -> None:
    with pytest.raises(MisconfigurationException, match=r"given_up=.*'det' is in tasks="):
        callback(given_up=["det"])
    assert callback(given_up="old").given_up == ["old"]


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="this torch does not tell hooks"
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_for_a_task_that_ran_as_often_without_checkpointing_is_an_error(reentrant: bool) -> None:
    class Labelled(TasksModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with lightning_bn.task("seg"):
                other = checkpoint(self.net, batch["x"].requires_grad_(), use_reentrant=reentrant)
            return (other + self.net(batch["x"])).square().mean()

    class ByHand(TasksModule):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            with lightning_bn.task("det"):
                first = checkpoint(self.net, batch["x"].requires_grad_(), use_reentrant=reentrant)
            with lightning_bn.task("seg"):
                self.manual_backward((first + self.net(batch["x"])).square().mean())

    with pytest.raises(RecomputationError, match=r"for task 'det', but that forward was of task 'seg'"):
        fit(Labelled(), batches_of(["det"] * 3), callback())
    with pytest.raises(RecomputationError, match=r"for task 'seg', but that forward was of task 'det'"):
        fit(ByHand(), batches_of([None] * 3), callback(task_key=None))


def test_layer_that_is_replaced_is_watched_too() -> None:
    class Replaces(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                pl_module.net = copy.deepcopy(pl_module.net)

    class Forgets(TasksModule):
        def parts(self, batch: Any) -> Any:
            return [(batch.get("task", None), batch)]

    with (
        pytest.warns(UserWarning, match="were replaced"),
        pytest.warns(UserWarning, match="outside of any task's context"),
        pytest.raises(MisconfigurationException, match="it is not known which task a batch belongs to"),
    ):
        fit(Forgets(), batches_of(["det", "seg", "det", None]), callback(task_key=None), Replaces())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_file_of_callbacks_with_other_names_is_named(tmp_path: Any) -> None:
    saved(tmp_path / "c.ckpt", name="body")
    with pytest.warns(UserWarning, match=r"of 'TaskBatchNorm', but of 'TaskBatchNorm\[body\]'"):
        resume(tmp_path / "c.ckpt")


@pytest.mark.parametrize("start", ["shared", "cumulative"])
def test_statistics_that_an_evaluation_has_read_can_be_trained_on(tmp_path: Any, start: str) -> None:
    saved(tmp_path / "c.ckpt", start=start)
    tasks, module = callback(start=start), TasksModule()
    trainer = quiet(callbacks=[tasks], max_epochs=2, limit_val_batches=1, num_sanity_val_steps=0)
    trainer.validate(module, loader_of(batches_of(["seg"])), ckpt_path=tmp_path / "c.ckpt", verbose=False)
    trainer.fit(module.train(), loader_of(batches_of(TASKS)), loader_of(batches_of(["seg"])))
    assert {int(one["net.body.1"]["num_batches_tracked"]) for _, one in tasks.bank.parts()} == {3 + 2}
