"""Running statistics of its own for each task, through a fit, its checkpoints and every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_bn.callbacks._base import BatchNormCallback
from lightning_bn.callbacks._lightning.callback_list import put_first
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_bn.callbacks._lightning.state import fits
from lightning_bn.callbacks._ranks import agree_on_ranks
from lightning_bn.callbacks._task_averages import TaskAverages
from lightning_bn.callbacks._task_of import TaskOf
from lightning_bn.callbacks._tasks_on_ranks import TasksOnRanks
from lightning_bn.callbacks._val_tasks import ValTasks
from lightning_bn.functional._checks import check_choice, check_flag, check_text
from lightning_bn.functional._text import quoted
from lightning_bn.functional.tasks.bank import TaskStatistics
from lightning_bn.functional.tasks.drift import TaskDrift, task_drift
from lightning_bn.functional.tasks.session import RAISE, TaskSession
from lightning_bn.functional.tasks.task_sets import checked_tasks


class TaskBatchNorm(BatchNormCallback):
    """Keep running statistics of the BatchNorm layers for each task, in layers that stay what they are.

    Where tasks share a backbone, training normalizes each batch with statistics of its own task, and one moving average
    of all of them describes none. Here a batch's task has its own tensors in the layers' place while it runs. The
    default task owns the layers' own: the plain state dict is always that of the default task, with the same keys. The
    other sets are saved in the callback's state. Training is not disturbed: it does not read running statistics, so
    that losses and weights are bit-identical to a run without it, frozen layers excepted.

    Args:
        tasks: Their names.
        modules: Which BatchNorm layers, as for `lightning_bn.functional.batch_norm_layers`; None for all.
            `TaskDrift.suggest` says which ones need it.
        exclude: Which of them not.
        root: Put before every path, for instance `"model"` where the network is in `self.model`.
        task_key: Where the task of a batch is found: a key of the batch, or the import path of a function of batch and
            batch index. None: `lightning_bn.task` inside the step. A context inside the step counts more than
            the batch's key. Where it holds a task for each sample, each is normalized with its own.
        val_tasks: Tasks of the loaders in evaluation, by `dataloader_idx`: a list, or a dict with a list for each of
            `"val"`, `"test"` and `"predict"`. None: `task_key`, then contexts.
        default: The task that owns the layers' own tensors; None for the first.
        unlabelled: `"raise"`, or the task of batches of which nothing tells theirs.
        start: How statistics begin, as for `lightning_bn.functional.task_statistics`.
        merge: Whether ranks merge their statistics before each validation and at the end of the fit, weighted by the
            samples that each saw of a task.
        given_up: Tasks of the checkpoint that this run does without.
        name: Tells this callback from another one in the same Trainer, which refuses two of one name.

    Attributes:
        bank: The statistics, from the first run on.

    Raises:
        MisconfigurationException: If a name is no task, or an argument is not one of those above; when a fit is set
            up, if the strategy shards the model; in a run, if ``val_tasks`` and the loaders differ in number, a batch
            has a task that is none of ``tasks``, or nothing tells it.
        SelectionError: When the run starts, if the selection means no layer or one without running statistics.
        RuntimeError: If a layer has statistics per task of another callback.
        DisagreementError: If ranks that share statistics have batches of different tasks.

    Source: Chang et al. (2019), "Domain-Specific Batch Normalization", arXiv 1906.03950, section 3.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        modules: str | Sequence[str] | None = None,
        *,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        task_key: str | None = None,
        val_tasks: list[str] | dict[str, list[str]] | None = None,
        default: str | None = None,
        unlabelled: str = RAISE,
        start: Literal["cumulative", "shared"] = "cumulative",
        merge: bool = True,
        given_up: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        with self._checked():
            self._select(modules, exclude, root, name)
            self.tasks = checked_tasks(tasks)
            self.default = self.tasks[0] if default is None else default
            check_choice("default", self.default, self.tasks)
            check_choice("unlabelled", unlabelled, (RAISE, *self.tasks))
            check_choice("start", start, ("cumulative", "shared"))
            check_text("task_key", task_key, none="where contexts name the task")
            check_flag("merge", merge)
            self._val_tasks = ValTasks(val_tasks, self.tasks)
            self.given_up = checked_tasks(given_up) if given_up else []
            kept = [task for task in self.given_up if task in self.tasks]
            if kept:
                raise ValueError(f"given_up={given_up!r}: {quoted(kept)} is in tasks={self.tasks!r} too: name it once.")
        self.task_key, self.val_tasks, self.unlabelled, self.merge = task_key, val_tasks, unlabelled, merge
        self.start: Literal["cumulative", "shared"] = start
        self.bank: TaskStatistics | None = None
        otherwise = None if unlabelled == RAISE else unlabelled
        self._task_of = TaskOf(task_key, tasks=self.tasks, otherwise=otherwise)
        self._session: TaskSession | None = None
        self._averages: TaskAverages | None = None
        self._restored: Mapping[str, Any] | None = None
        self._ranks: TasksOnRanks | None = None
        self._told_of_none = self._made_up = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        put_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Again: a freezer, which was set up later, would shadow statistics that are exchanged afterwards.
        put_first(trainer, self)
        facts = {"tasks": tuple(self.tasks), "default": self.default, "merge": self.merge}
        agree_on_ranks(trainer, "keep statistics per task", lambda: self._layout(pl_module), facts)
        self._end()
        self._ranks = TasksOnRanks(trainer, self._begin(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._session is None or self._ranks is None:
            return
        self._session.end_skipped_batch()
        task = self._ranks.agree(lambda: self._task_of.of_rows(batch, batch_idx))
        self._session.start_batch(task, samples=self._ranks.samples_in(batch, task))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Before WeightAveraging takes what lies in the layers.
        self._end_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is None or self._ranks is None:
            return
        self._session.end_skipped_batch()
        self._ranks.warn_of_unseen(self._session.seen)
        if len(self.tasks) > 1 and trainer.loggers:
            self._log_curves(trainer, {"bn/task_drift_max": self.drift().worst()[-1]})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module, "val", trainer.num_val_batches)
        if fits(trainer) and not trainer.sanity_checking:
            self._merge()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module, "test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation(trainer, pl_module, "predict", trainer.num_predict_batches)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._session is not None:
            task = self._val_tasks.of(dataloader_idx) or self._task_of.of_rows(batch, batch_idx)
            self._session.start_batch(task, training=False)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._end_batch()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.end_skipped_batch()

    on_test_end = on_predict_end = on_validation_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is None:
            return
        self._session.end_skipped_batch()
        self._merge()
        if len(self.tasks) > 1:
            rank_zero_info(f"TaskBatchNorm: {self.drift()}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Averages go on until another run begins: a file that is saved now holds them.
        averages, self._averages = self._averages, None
        self._end()
        self._averages = averages

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def drift(self) -> TaskDrift:
        """Return how far the tasks' statistics lie apart, in each layer.

        Raises:
            RuntimeError: Before the first run.
            ValueError: If there is only one task.
        """
        if self.bank is None:
            raise RuntimeError("TaskBatchNorm has no statistics yet: call drift() after a run has begun.")
        return task_drift(self.bank)

    def state_dict(self) -> dict[str, Any]:
        if self.bank is None:
            return dict(self._restored or {})
        state = self.bank.state_dict()
        return state if self._averages is None else self._averages.added_to(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
        if self._session is not None and self.bank is not None and self._restored is not None:
            # In mid-fit, as tuners do that begin anew from where they were.
            self._load(self.bank)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.state_key not in checkpoint.get("callbacks", {}):
            others = self._known_under_other_names(checkpoint)
            self._end()
            self.bank = None
            of_others = f" of {self.state_key!r}, but of {quoted(others)}" if others else ""
            (rank_zero_warn if others else rank_zero_info)(
                f"TaskBatchNorm: the checkpoint has no statistics per task{of_others}: {quoted(self.tasks)} all start "
                "with the running statistics of the checkpoint"
            )
            self._told_of_none = True

    def _begin(self, trainer: Trainer, module: LightningModule) -> TaskStatistics:
        if self.bank is None or not self.bank.is_of(module):
            with self._checked():
                self.bank = TaskStatistics(module, self.tasks, self._selection, default=self.default, start=self.start)
        else:
            self.bank.attach()
        self._averages = TaskAverages(trainer, self.bank) if fits(trainer) else None
        if self._restored is not None:
            self._load(self.bank)
        self.bank.task_of = self._task_of
        self.bank.outside.begin(_warn)
        self._session = TaskSession(self.bank, self.unlabelled)
        return self.bank

    def _load(self, bank: TaskStatistics) -> None:
        """Take what was restored: what training goes on with where averages are kept beside it, else what is in use."""
        state, self._restored = self._restored or {}, None
        averages = self._averages
        with self._checked():
            current = state if averages is None else averages.current(state)
            told = bank.load_state_dict(current, given_up=self.given_up)
        if averages is not None:
            averages.load(state)
        for message in told:
            rank_zero_info(f"TaskBatchNorm: {message}")

    def _start_evaluation(
        self, trainer: Trainer, module: LightningModule, stage: str, loaders: Sequence[int | float]
    ) -> None:
        if self._session is None:
            known = (self.bank is not None and self.bank.is_of(module)) or self._restored is not None
            self._begin(trainer, module)
            self._made_up = not known
            if not known and not self._told_of_none:
                self._told_of_none = True
                rank_zero_info(
                    f"TaskBatchNorm: there are no statistics per task yet: {quoted(self.tasks)} are all evaluated with "
                    f"the running statistics of the model"
                )
        else:
            self._session.end_skipped_batch()
        with self._checked():
            self._val_tasks.begin(stage, len(loaders))

    def _merge(self) -> None:
        if self.merge and self._session is not None and self._ranks is not None:
            self._ranks.merge(self._session, [] if self._averages is None else self._averages.parts())

    def _end_batch(self) -> None:
        if self._session is not None:
            with self._checked():
                self._session.end_batch()

    def _end(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._averages is not None:
            self._averages.end()
        if self.bank is not None:
            self.bank.detach()
        if self._made_up:
            # Copies of what the model held for this evaluation: next time it may hold something else.
            self.bank, self._made_up = None, False
        self._session = self._averages = self._ranks = None


def _warn(message: str) -> None:
    rank_zero_warn(f"TaskBatchNorm: {message}")
