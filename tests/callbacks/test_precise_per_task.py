"""PreciseBatchNorm where layers have statistics per task: limits, sources, indices, what it replaced, what it logs."""

import copy
import csv
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from lightning_bn import PreciseBatchNorm
from lightning_bn.callbacks._replaced import ReplacedAverage
from lightning_bn.functional import recalibrate, task_statistics
from lightning_bn.functional.layers.sets_per_task import sets_of
from tests.callbacks.fits import quiet
from tests.callbacks.task_fits import TASKS, TasksModule, batch_of, batches_of, callback, fit, loader_of, norms, sets
from tests.models import bits

NINE_TO_ONE = batches_of((["det"] * 9 + ["seg"]) * 3 + ["depth"] * 3)


class ByHand(TasksModule):
    """Has its statistics per task without a callback, and holds them; each batch in its context."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bank = task_statistics(self, TASKS, start="shared")
        self.bank.task_of = lambda batch, batch_idx: batch["task"]
        self.ran: list[tuple[int, str]] = []
        self.kept: tuple[Any, dict[str, bytes]] | None = None

    def task(self, batch: Any, batch_idx: int) -> str:
        return str(batch["task"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not torch.is_grad_enabled():
            RAN.append((batch_idx, self.task(batch, batch_idx)))
        with self.bank.task(self.task(batch, batch_idx)):
            return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.kept = copy.deepcopy(self.net), sets(self.bank)


#: Outside of the module, what it holds is restored after a pass.
RAN: list[tuple[int, str]] = []


def run(module: ByHand, batches: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    RAN.clear()
    return fit(module, batches, *callbacks, **{"val": [batches_of(["det"])], "num_sanity_val_steps": 0, **options})


def assert_from(module: ByHand, batches: Any, task: str) -> None:
    """At validation the task held the statistics of these batches, with the weights of then."""
    net, held = module.kept  # type: ignore[misc]
    separate = copy.deepcopy(net).train()
    recalibrate(separate, [one["x"] for one in batches])
    for name, layer in norms(separate).items():
        for key in ("running_mean", "running_var"):
            found = torch.frombuffer(bytearray(held[f"{task}/net.{name}.{key}"]), dtype=torch.float64)
            torch.testing.assert_close(found, getattr(layer, key), rtol=1e-9, atol=1e-12)


def first(batches: Any, task: str, count: int) -> list[Any]:
    return [one for one in batches if one["task"] == task][:count]


def test_the_limit_holds_for_each_task_and_no_batch_more_is_run() -> None:
    module, precise = ByHand(), PreciseBatchNorm(num_batches=2)
    run(module, NINE_TO_ONE, precise)
    for task in TASKS:
        assert precise.last.tasks[task].num_batches == 2
        assert_from(module, first(NINE_TO_ONE, task, 2), task)
    assert [task for _, task in RAN] == ["det", "det", "seg", "seg", "depth", "depth"]


def test_recent_batches_are_the_last_of_each_task_with_their_own_indices() -> None:
    module, precise = ByHand(), PreciseBatchNorm(num_batches=2, source="recent")
    run(module, NINE_TO_ONE, precise)
    assert RAN == [(19, "seg"), (27, "det"), (28, "det"), (29, "seg"), (31, "depth"), (32, "depth")]
    for task in TASKS:
        assert_from(module, [one for one in NINE_TO_ONE if one["task"] == task][-2:], task)


class ByIndex(ByHand):
    """Only the index of a batch tells its task."""

    def __init__(self) -> None:
        super().__init__()
        self.bank.task_of = self.task

    def task(self, batch: Any, batch_idx: int) -> str:
        return "seg" if batch_idx % 5 == 4 else "det"


@pytest.mark.parametrize("source", ["train", "recent"])
def test_the_step_and_who_tells_the_task_have_the_same_index(source: Any) -> None:
    batches = batches_of(["det"] * 15)
    module, precise = ByIndex(), PreciseBatchNorm(num_batches=2, source=source)
    run(module, batches, precise)
    expected = [0, 1, 4, 9] if source == "train" else [9, 12, 13, 14]
    assert [index for index, _ in RAN] == expected
    assert all(task == module.task(None, index) for index, task in RAN)
    assert_from(module, [batches[index] for index in expected if index % 5 == 4], "seg")
    assert precise.last.tasks["depth"].num_batches == 0


@pytest.mark.parametrize("order", ["alternating", "joint"])
def test_the_replaced_averages_of_all_tasks_come_back_and_nobody_is_warned(order: str) -> None:
    found: dict[bool, Any] = {}
    names = TASKS * 3
    joint = [{task: batch_of(task, 10 * seed + at) for at, task in enumerate(TASKS)} for seed in range(5)]
    batches = batches_of(names) if order == "alternating" else joint
    for precise in (False, True):
        tasks = callback(task_key="task" if order == "alternating" else None)
        callbacks = [PreciseBatchNorm(num_batches=3, restore=True)] * precise
        pl.seed_everything(1, verbose=False)
        module = TasksModule()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*outside of any task")
            val = [batches[:1]]
            fit(module, batches, tasks, *callbacks, val=val, num_sanity_val_steps=0, max_epochs=3, limit_val_batches=1)
        counters = {key: value for key, value in sets(tasks.bank).items() if "tracked" in key}
        found[precise] = [bits(one) for one in module.parameters()], module.losses, counters
    assert found[False] == found[True]


class Averages(pl.Callback):
    """What every task holds when a training batch has begun."""

    def __init__(self, bank: Any) -> None:
        self.bank, self.found = bank, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(sets(self.bank()))


def test_a_resumed_fit_brings_back_what_was_replaced_before_it_was_saved(tmp_path: Any) -> None:
    batches = batches_of(TASKS * 2)

    def parts() -> Any:
        tasks = callback()
        return [tasks, PreciseBatchNorm(num_batches=2, restore=True), Averages(lambda: tasks.bank)]

    options: Any = {"val": [batches[:1]], "num_sanity_val_steps": 0}
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    whole, half = parts(), parts()
    pl.seed_everything(1, verbose=False)
    fit(TasksModule(), batches, *whole, saving, max_epochs=2, enable_checkpointing=True, **options)
    pl.seed_everything(1, verbose=False)
    fit(TasksModule(), batches, *half, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert half[-1].found == whole[-1].found[len(batches) :]


def test_older_checkpoints_of_replaced_averages_are_read() -> None:
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    before = bits(net[0].running_mean)
    done = recalibrate(net, [torch.randn(8, 2) + 5])
    replaced = ReplacedAverage()
    replaced.load_state_dict([done.before.state_dict(), done.after.state_dict()])
    replaced.bring_back(net)
    assert bits(net[0].running_mean) == before


def test_curves_have_the_same_keys_in_each_epoch_also_of_a_task_without_a_batch(tmp_path: Any) -> None:
    module, logger = ByHand(), CSVLogger(tmp_path)
    run(module, batches_of(["det", "seg"] * 4), PreciseBatchNorm(num_batches=3), logger=logger, max_epochs=2)
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["bn/precise_samples"]]
    assert len(rows) == 2
    for row in rows:
        assert [row[f"bn/precise_{task}_samples"] for task in TASKS] == ["24", "24", "0"]
        assert all(row[f"bn/precise_{task}_standard_error"] for task in TASKS)


class Untold(ByHand):
    def __init__(self) -> None:
        super().__init__()
        self.bank.task_of = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return TasksModule.training_step(self, batch, batch_idx)


def test_where_nothing_tells_the_task_it_says_what_to_do_and_the_fit_goes_on() -> None:
    module, precise = Untold(), PreciseBatchNorm(num_batches=2)
    with pytest.warns(
        UserWarning, match=r"PreciseBatchNorm: .* the tasks 'det', 'seg', 'depth', and it is not known which task"
    ):
        trainer = run(module, batches_of(["det"] * 3), precise)
    assert trainer.state.finished
    assert precise.last is None


def test_an_unknown_task_ends_the_fit_and_changes_nothing() -> None:
    module = ByHand()
    module.bank.task_of = lambda batch, batch_idx: "sgt"
    seen: list[Any] = []

    class Before(pl.Callback):
        def on_validation_start(self, *_: Any) -> None:
            seen.append(sets(module.bank))

    with pytest.raises(
        ValueError, match=r"task 'sgt', but there are statistics only for the tasks 'det', 'seg', 'depth'"
    ):
        run(module, batches_of(["det"] * 3), PreciseBatchNorm(), Before())
    assert sets(module.bank) == seen[0]


def test_a_set_that_is_written_to_again_is_an_error_that_names_its_task() -> None:
    module = ByHand()

    class Writing(PreciseBatchNorm):
        def _recalibrate_now(self, trainer: Any, module_: Any) -> None:
            sets_ = sets_of(module.net.body[1])
            wrote = sets_.wrote

            def again(task: str) -> None:
                wrote(task)
                module.bank.home_of(module.net.body[1], "seg")["running_var"].add_(1)

            module.bank.wrote = again  # type: ignore[method-assign]
            super()._recalibrate_now(trainer, module_)

    with pytest.raises(RuntimeError, match=r"net\.body\.1.* changed again after it wrote them"):
        run(module, batches_of(["det", "seg"] * 3), Writing(num_batches=2))


def test_test_runs_are_preceded_by_it_with_a_source_of_their_own() -> None:
    class WithTarget(ByHand):
        def target(self) -> Any:
            return loader_of(batches_of(["det", "det", "seg"], seed=70))

    module, precise = WithTarget(), PreciseBatchNorm(num_batches=1, source_method="module.target")
    quiet(callbacks=[precise]).validate(module, loader_of(batches_of(["det"])), verbose=False)
    target = batches_of(["det", "det", "seg"], seed=70)
    assert_from(module, target[:1], "det")
    assert_from(module, target[2:], "seg")
