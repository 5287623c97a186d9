"""Statistics per task in real fits: what is logged, what can be monitored, what is named, how a fit is resumed."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_bn import BatchNormFreezer
from lightning_bn.functional import TaskStatistics, task_statistics
from lightning_bn.functional.statistics.drift_measures import drift
from tests.callbacks.fits import Net, quiet, samples, trajectory, val_loader
from tests.callbacks.monitoring_fits import csv_rows, monitor, warned
from tests.models import bits, seeded
from tests.versions import reading

TASKS = ("det", "seg", "never")
FAR = {"det": -3.0, "seg": 3.0}
KEYS = {f"bn/{task}/jeffreys_{what}" for task in TASKS for what in ("mean", "max")}


class TakingTurns(pl.LightningModule):
    """Batches of two tasks take turns, each in the context of its own; the sets are saved with the module."""

    def __init__(self, lr: float = 1e-3, modules: Any = None, bank: bool = True) -> None:
        super().__init__()
        self.net, self.lr = seeded(lambda: Net(dropout=0.0)), lr
        with torch.no_grad():
            for seed in range(60):
                self.net(samples(32, seed=50 + seed).tensors[0])
        self._banks: list[TaskStatistics] = []
        if bank:
            # As a moving average from the first batch on, as in sets that are long there.
            self._banks.append(task_statistics(self, TASKS, modules, start="shared"))

    @property
    def bank(self) -> TaskStatistics:
        return self._banks[0]

    def fault(self, x: Tensor, task: str, batch_idx: int) -> Tensor:
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # The same whether or not a loader was resumed in the middle of an epoch.
        x, y, _ = samples(8, seed=batch_idx).tensors
        task = TASKS[batch_idx % 2]
        with self.bank.task(task):
            return F.cross_entropy(self.net(self.fault(x + FAR[task], task, batch_idx)), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with self.bank.task(TASKS[batch_idx % 2]):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["bank"] = self.bank.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint["bank"]

    def on_fit_start(self) -> None:
        if getattr(self, "_saved", None) is not None:
            self.bank.load_state_dict(self._saved)
            self._saved = None


def loader(count: int) -> DataLoader[Any]:
    return DataLoader(samples(count), batch_size=8)


def fit(module: pl.LightningModule, *callbacks: Any, count: int = 256, ckpt_path: Any = None, **options: Any) -> Any:
    """Trains on ``count // 8`` batches an epoch; the Trainer and what monitors warned of."""
    trainer = quiet(callbacks=list(callbacks), **{"max_epochs": 2, **options})
    return trainer, warned(lambda: trainer.fit(module, loader(count), val_loader(), **reading(ckpt_path)))


class Seen(pl.Callback):
    """Each task's statistics as training starts, and after every batch."""

    def __init__(self) -> None:
        self.snapshots: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.snapshots[0] = {task: pl_module.bank.snapshot(task) for task in TASKS}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.snapshots[trainer.global_step] = {task: pl_module.bank.snapshot(task) for task in TASKS}


def largest(one: Any, other: Any) -> float:
    return max(float(values.max()) for values in drift(one, other).values())


def test_curves_of_every_task_are_there_from_the_first_sample_on(tmp_path: Path) -> None:
    logger, seen = CSVLogger(tmp_path), Seen()
    module = TakingTurns()
    # A task that has begun is measured once it is warm.
    with module.bank.task("seg"), torch.no_grad():
        for seed in range(60):
            module.net(samples(32, seed=50 + seed).tensors[0])
    _, said = fit(module, monitor(every_n_steps=4), seen, logger=logger, max_epochs=1, count=128)
    assert not [line for line in said if "alternate" in line], said
    rows = csv_rows(logger)
    assert len(rows) == 4
    for row in rows:
        assert row.keys() >= KEYS
        now, then = seen.snapshots[int(row["step"])], seen.snapshots[0]
        for task in ("det", "seg"):
            assert float(row[f"bn/{task}/jeffreys_max"]) == pytest.approx(largest(then[task], now[task]), rel=1e-6)
        assert float(row["bn/never/jeffreys_max"]) == 0
        assert row["bn/jeffreys_max"] == row["bn/det/jeffreys_max"], "the default's are the layers' own"


def test_checkpoints_and_early_stopping_find_a_tasks_drift(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="bn/seg/jeffreys_max", filename="{epoch}")
    stop = EarlyStopping("bn/det/jeffreys_max", divergence_threshold=1.0, patience=10**6)
    trainer, _ = fit(TakingTurns(), monitor(), best, stop, enable_checkpointing=True, max_epochs=5)
    assert set(trainer.callback_metrics) >= KEYS
    assert best.best_model_path
    assert stop.stopped_epoch or trainer.current_epoch < 5


def test_a_fit_with_statistics_per_task_that_are_healthy_is_called_so() -> None:
    _, said = fit(TakingTurns(), monitor(every_n_steps=3), max_epochs=4)
    assert said == []


def test_layers_without_sets_of_their_own_are_told_what_to_give() -> None:
    _, said = fit(TakingTurns(modules="net.head"), monitor(every_n_steps=3), max_epochs=4)
    [line] = said
    assert "net.features.1" in line
    assert "gets its batches from sources that alternate" in line
    assert "TaskBatchNorm(modules=['net.features'])" in line


def test_a_remedy_means_no_layer_that_is_not_watched() -> None:
    class Wide(TakingTurns):
        def __init__(self) -> None:
            super().__init__(modules="net.head")
            self.net.features.append(torch.nn.BatchNorm2d(4))

    _, said = fit(Wide(), monitor(modules="net.features.1"), max_epochs=2)
    assert "TaskBatchNorm(modules=['net.features.1'])" in said[0]


def test_one_tasks_own_sources_that_alternate_are_named_with_it() -> None:
    class Alternating(TakingTurns):
        def fault(self, x: Tensor, task: str, batch_idx: int) -> Tensor:
            return x + (6.0 if batch_idx // 2 % 2 else -6.0) if task == "seg" else x

    _, said = fit(Alternating(), monitor(every_n_steps=4), max_epochs=5)
    [line] = said
    assert "net.features.1 with the statistics of task 'seg' gets its batches from sources that alternate" in line


@pytest.mark.parametrize("task", ["det", "seg"])
def test_a_bad_batch_of_one_task_is_named_with_it(task: str) -> None:
    class Bad(TakingTurns):
        def fault(self, x: Tensor, task_of: str, batch_idx: int) -> Tensor:
            return x * (torch.inf if (task_of, batch_idx // 2) == (task, 5) else 1)

    _, said = fit(Bad(), monitor(), max_epochs=1)
    # Its gradient spoils the weights, and thereby the other task.
    line = next(line for line in said if "not finite" in line)
    step = 11 if task == "det" else 12
    assert f"step {step}: net.features.1 (and 2 more layers) with the statistics of task {task!r} has " in line


def test_drift_of_one_task_stops_training_and_names_it() -> None:
    class Shifted(TakingTurns):
        def fault(self, x: Tensor, task: str, batch_idx: int) -> Tensor:
            return x + 20 if task == "seg" and self.trainer.current_epoch == 2 else x

    module = Shifted(lr=1e-5)
    for task in ("det", "seg"):
        with module.bank.task(task), torch.no_grad():
            for seed in range(60):
                module.net(samples(32, seed=50 + seed).tensors[0] + FAR[task])
    trainer, said = fit(module, monitor(act_above=3.0, action="stop"), max_epochs=9)
    assert trainer.current_epoch <= 3
    assert any("task 'seg': net.features.1 moved since " in line and "training stops" in line for line in said)


@pytest.mark.parametrize("reference", ["fit_start", "previous_epoch"])
@pytest.mark.parametrize("middle", [True, False])
def test_a_resumed_fit_measures_as_the_uninterrupted_one_does(tmp_path: Path, reference: str, middle: bool) -> None:
    def watched() -> Any:
        return monitor(every_n_steps=3, reference=reference)

    whole = watched()
    fit(TakingTurns(), whole, max_epochs=4, count=512)
    options = {"every_n_train_steps": 90} if middle else {"every_n_epochs": 1}
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **options)
    fit(TakingTurns(), watched(), saving, enable_checkpointing=True, max_epochs=2, count=512)
    path = tmp_path / f"step={90 if middle else 128}.ckpt"
    resumed = watched()
    fit(TakingTurns(), resumed, max_epochs=4, count=512, ckpt_path=path)
    one, other = whole._session, resumed._session
    assert one is not None
    assert other is not None
    for task in TASKS:
        assert other.tasks[task].history.steps == one.tasks[task].history.steps
        assert other.tasks[task].history.marks == one.tasks[task].history.marks
        assert bits(other.tasks[task].history.values()) == bits(one.tasks[task].history.values())
        assert other.tasks[task].reference.same_bits(one.tasks[task].reference)
    assert one.tasks["seg"].history.values()[-1].min() > 0
    assert bits(other.history.values()) == bits(one.history.values())


def test_a_checkpoint_of_before_the_sets_is_gone_on_from_and_that_is_told(tmp_path: Path) -> None:
    class Plain(TakingTurns):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["bank"] = None

    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(Plain(bank=False), monitor(), saving, enable_checkpointing=True, max_epochs=1, count=64)
    watching = monitor()
    _, said = fit(TakingTurns(), watching, max_epochs=2, count=64, ckpt_path=tmp_path / "last.ckpt")
    assert [line for line in said if "has no drift of the layers of task 'det', 'seg', 'never'" in line]
    assert watching.history.steps == list(range(1, 17))


# --- a checkpoint as the reference ---------------------------------------------------------------------------------


def saved(module: TakingTurns, path: Path, **changed: Any) -> Path:
    state = {**module.bank.state_dict(), **changed}
    torch.save({"state_dict": module.state_dict(), "callbacks": {"TaskBatchNorm[x]": state}}, path)
    return path


def moved(seed: int = 0) -> TakingTurns:
    module = TakingTurns()
    for shift, task in enumerate(TASKS):
        with module.bank.task(task), torch.no_grad():
            for again in range(50):
                module.net(samples(32, seed=90 + seed + again).tensors[0] * (1 + shift) + shift)
    return module


def test_a_checkpoint_with_sets_is_measured_from_task_by_task(tmp_path: Path) -> None:
    there, here, seen = moved(), moved(5), Seen()
    path, watching = saved(there, tmp_path / "x.ckpt"), monitor(reference=str(tmp_path / "x.ckpt"))
    fit(here, watching, seen, max_epochs=1, count=64)
    last = watching._session.last  # type: ignore[union-attr]
    assert path.exists()
    assert last is not None
    for task in TASKS:
        expected = largest(there.bank.snapshot(task), seen.snapshots[8][task])
        assert last.tasks[task].max == pytest.approx(expected, rel=1e-9)
    assert last.summary.max == last.tasks["det"].max


def test_a_checkpoint_without_sets_is_what_all_tasks_are_measured_from(tmp_path: Path) -> None:
    there, here, seen = moved(), moved(5), Seen()
    torch.save(there.state_dict(), tmp_path / "x.ckpt")
    watching = monitor(reference=str(tmp_path / "x.ckpt"))
    fit(here, watching, seen, max_epochs=1, count=64)
    last = watching._session.last  # type: ignore[union-attr]
    assert last is not None
    for task in TASKS:
        expected = largest(there.bank.snapshot("det"), seen.snapshots[8][task])
        assert last.tasks[task].max == pytest.approx(expected, rel=1e-9)


def test_a_checkpoint_with_another_default_task_is_read_by_the_names_of_tasks(tmp_path: Path) -> None:
    there, here, seen = moved(), moved(5), Seen()
    state, own = there.bank.state_dict(), there.bank.snapshot("det")
    # As if "seg" had been the default: its values in the state dict, and those of "det" among the sets.
    of_det = {
        f"{name}.{key}": there.get_buffer(f"{name}.{key}").clone()
        for name in there.bank.layers
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    own_state = {**there.state_dict(), **state["sets"]["seg"]}
    sets = {"det": of_det, "never": state["sets"]["never"]}
    callbacks = {"TaskBatchNorm": {**state, "default": "seg", "sets": sets}}
    torch.save({"state_dict": own_state, "callbacks": callbacks}, tmp_path / "x.ckpt")
    watching = monitor(reference=str(tmp_path / "x.ckpt"))
    fit(here, watching, seen, max_epochs=1, count=64)
    session = watching._session
    assert session is not None
    assert session.own.reference.same_bits(own)
    assert session.tasks["det"].reference.same_bits(own)
    assert session.tasks["seg"].reference.same_bits(there.bank.snapshot("seg"))
    assert session.tasks["never"].reference.same_bits(there.bank.snapshot("never"))


def test_a_set_of_other_channels_in_a_checkpoint_is_an_error_that_names_task_and_layer(tmp_path: Path) -> None:
    there = moved()
    state = there.bank.state_dict()
    state["sets"]["seg"]["net.bn.running_mean"] = torch.zeros(7)
    torch.save({"state_dict": there.state_dict(), "callbacks": {"TaskBatchNorm": state}}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match=r"task 'seg': layer 'net.bn' has 7 channels in the file and 4 in this model"):
        fit(TakingTurns(), monitor(reference=str(tmp_path / "x.ckpt")))


# --- with the others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
def test_training_is_bit_identical_with_and_without(frozen: bool) -> None:
    def run(*watching: Any) -> Any:
        used = [BatchNormFreezer("net.bn")] if frozen else []
        return trajectory(
            TakingTurns, lambda: {"train_dataloaders": loader(64), "val_dataloaders": val_loader()}, *used, *watching
        )

    trace, parameters, module = run()
    other_trace, other_parameters, other = run(monitor())
    assert trace == other_trace
    assert parameters == other_parameters
    for task in TASKS:
        assert module.bank.snapshot(task).same_bits(other.bank.snapshot(task))
    assert module.bank.outside.times == other.bank.outside.times


def test_a_layer_that_the_freezer_keeps_is_no_fault_of_any_task() -> None:
    for first in (True, False):
        callbacks = [BatchNormFreezer("net.bn"), monitor()]
        _, said = fit(TakingTurns(), *(callbacks if first else callbacks[::-1]))
        assert said == []


def test_a_context_that_lies_in_the_layers_at_every_hook_changes_nothing() -> None:
    """As where a callback puts a batch's task in before the monitor's turn, and takes it out after it."""

    class Labels(pl.Callback):
        context: Any = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.context = pl_module.bank.task(TASKS[batch_idx % 2])
            self.context.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            self.context.__exit__(None, None, None)

    outcomes = []
    for before in (False, True):
        watching = monitor(every_n_steps=3)
        _, said = fit(TakingTurns(), *([Labels()] if before else []), watching, count=128)
        outcomes.append((said, [bits(one.history.values()) for one in watching._session._sets]))  # type: ignore[union-attr]
    assert outcomes[0] == outcomes[1]
