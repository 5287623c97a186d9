"""BatchNorm layers of configured submodules kept frozen through a fit, with proof that they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import LBFGS

from lightning_bn.callbacks._lightning.averages import averaged_copies
from lightning_bn.callbacks._lightning.callback_list import put_first, same_kind_beside
from lightning_bn.callbacks._lightning.namespaces import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_bn.callbacks._lightning.state import refuse_sharded
from lightning_bn.callbacks._ranks import agree_on_ranks
from lightning_bn.callbacks._task_of import TaskOf, listen, stop_listening
from lightning_bn.functional._text import quoted
from lightning_bn.functional.freezing.freeze_plan import FreezePlan, plan, select_by_task, selections
from lightning_bn.functional.freezing.schedule import FreezeSchedule
from lightning_bn.functional.freezing.session import Freeze, FreezeReport, Trip, in_words
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.layers.selection import batch_norm_layers
from lightning_bn.functional.statistics.channels import ChannelLayout


class BatchNormFreezer(Callback):
    """Keeps running statistics and affine parameters of the BatchNorm layers of some submodules fixed during a fit.

    Statistics: the layers normalize with their running statistics in training too, and stay so through any
    ``.train()``. Affine: their gradients are dropped before every optimizer step; the parameters stay in their
    optimizer groups and keep ``requires_grad``, so that distributed training, resuming and unfreezing are not
    disturbed. Whatever else moves a frozen value is noticed, put back and reported; at the end of the fit all of them
    are compared bit by bit with those at its beginning.

    Only BatchNorm is frozen; other weights below the same paths train on.

    Args:
        modules: Which BatchNorm layers, as for :func:`~lightning_bn.functional.batch_norm_layers`: module paths such as
            ``["vfe", "backbone_2d.blocks"]``, globs or regular expressions. None for all, or with ``by_task`` for none
            beside the tasks' own.
        exclude: Which of them not.
        root: Put before every path, for instance ``"model"`` where the network is in ``self.model``.
        stats: Whether to freeze running statistics.
        affine: Whether to freeze ``weight`` and ``bias``.
        start_epoch: First epoch in which they are frozen, from 0; a negative one counts from ``max_epochs``: -20 is the
            last 20 epochs.
        stop_epoch: First epoch in which they no longer are; a negative one counts from ``max_epochs``.
        start_step: First optimizer step (``trainer.global_step``) in which they are frozen.
        stop_step: First optimizer step in which they no longer are.
        by_task: Further modules for each task, frozen while a batch of that task is trained: their statistics do not
            move, and that batch contributes nothing to the gradients of their ``weight`` and ``bias``.
        task_key: Where the task of a batch is found: a key of the batch, or the import path of a function of batch and
            batch index. For steps that serve several tasks at once, use :func:`lightning_bn.task` inside the step.
        name: Tells this freezer from another one in the same Trainer, which refuses two of one name.

    Attributes:
        report: What became of the frozen values; None before a fit.

    Raises:
        MisconfigurationException: If nothing is to be frozen, if the schedule can never be on, if ``task_key`` leads
            nowhere, or if two freezers of one Trainer have the same ``name``.
        SelectionError: When the fit starts, if the selection means no layer or one without running statistics.

    Source: Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 4 for freezing in
    fine-tuning and in the last epochs.
    """

    def __init__(
        self,
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        root: str = "",
        stats: bool = True,
        affine: bool = True,
        start_epoch: int | None = None,
        stop_epoch: int | None = None,
        start_step: int | None = None,
        stop_step: int | None = None,
        by_task: dict[str, list[str]] | None = None,
        task_key: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if not stats and not affine:
            raise MisconfigurationException("BatchNormFreezer(stats=False, affine=False) freezes nothing.")
        if by_task is not None and not isinstance(by_task, Mapping):
            raise MisconfigurationException(
                f"BatchNormFreezer(by_task={by_task!r}) must say which modules for which task: {{'task': ['path']}}."
            )
        for key, value in (
            ("start_epoch", start_epoch),
            ("stop_epoch", stop_epoch),
            ("start_step", start_step),
            ("stop_step", stop_step),
        ):
            if value is not None and not isinstance(value, int):
                raise MisconfigurationException(f"BatchNormFreezer({key}={value!r}) must be a whole number, or None.")
        if task_key is not None and not by_task:
            raise MisconfigurationException(f"BatchNormFreezer(task_key={task_key!r}) means nothing without by_task.")
        try:
            self._schedule = FreezeSchedule(start_epoch, stop_epoch, start_step, stop_step)
        except ValueError as error:
            raise MisconfigurationException(f"BatchNormFreezer: {error}") from error
        self.modules = modules
        self.exclude = exclude
        self.root = root
        self.stats = stats
        self.affine = affine
        self.by_task = by_task
        self.name = name
        self.report: FreezeReport | None = None
        self._task_of = TaskOf(task_key)
        self._freeze: Freeze | None = None
        self._same_tasks = False
        self._batch_task: str | None = None
        self._in_batch = False
        self._swapped = False
        self._step = 0
        self._resumed: FreezeReport | None = None
        self._tasks_seen: set[str] = set()
        self._said_unseen = False

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self.name}]" if self.name else type(self).__name__

    def plan(self, model: nn.Module) -> FreezePlan:
        """What this freezer will do to ``model``, layer by layer; nothing is changed.

        Raises:
            SelectionError: If the selection means no layer or one without running statistics.
        """
        return plan(
            model,
            self.modules,
            exclude=self.exclude,
            root=self.root,
            stats=self.stats,
            affine=self.affine,
            by_task=self.by_task,
            schedule=self._schedule,
        )

    @contextmanager
    def allow_updates(self) -> Iterator[None]:
        """Inside, the layers are not frozen and may be given new values; afterwards those are the frozen ones."""
        if self._freeze is None:
            yield
        else:
            with self._freeze.released(self._step):
                yield

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_sharded(trainer, self)
        if any(other.state_key == self.state_key for other in same_kind_beside(trainer, self)):
            raise MisconfigurationException(
                f"two BatchNormFreezers have the name {self.name!r}: give each its own name=, so that their states "
                f"are told apart in checkpoints."
            )
        if stage == "fit":
            # What a run of validate read is not this fit's; what this fit resumes from is read later.
            self._resumed = None
        # In front of WeightAveraging, whose on_train_end puts the average in the place of what is compared here.
        put_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go(trainer.global_step)
        self.report = None
        self._is_on(trainer)
        # Ranks that train a layer which others hold would drift apart without a word.
        settings = {"stats": self.stats, "affine": self.affine, "when": str(self._schedule)}
        agree_on_ranks(trainer, "freeze", lambda: self._layout(pl_module), settings)
        if self._schedule.never_on(trainer.max_epochs, trainer.max_steps):
            # No error: the first part of a training that is resumed with more epochs looks like this.
            rank_zero_info(
                f"BatchNormFreezer: {self._schedule} is never reached with max_epochs={trainer.max_epochs} and "
                f"max_steps={trainer.max_steps}: nothing will be frozen in this fit"
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A module that goes into train mode in there would move pre-trained statistics before anything is frozen.
        if self._is_on(trainer):
            always, by_task = self._select(pl_module)
            every = (*always, *dict.fromkeys(name for names in by_task.values() for name in names))
            self._freeze = Freeze(pl_module, every, {}, stats=self.stats, affine=False, by=self.state_key)
            if self.stats:
                self._freeze.switch(True, 0, warn=False)
                self._freeze.keep([])

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._freeze is not None:
            # Not held on: Lightning would warn of modules in eval mode.
            self._say(self._freeze.switch(False, 0))
            self._freeze = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not earlier: before the sanity check Lightning would warn of modules in eval mode, and layers may
        # have been replaced since on_fit_start.
        always, by_task = self._select(pl_module)
        self._freeze = Freeze(
            pl_module,
            always,
            by_task,
            stats=self.stats,
            affine=self.affine,
            by=self.state_key,
            before=self._resumed,
            affine_cause=_affine_cause(trainer),
        )
        self._resumed, self._tasks_seen, self._swapped, self._said_unseen = None, set(), False, False
        layers = batch_norm_layers(pl_module)
        of_tasks = {name for names in by_task.values() for name in names}
        self._same_tasks = self.stats and any(processes_of(layers[name]) > 1 for name in of_tasks)
        self._freeze.switch(self._is_on(trainer), trainer.global_step)
        listen(self._on_task)
        if not self._schedule.never_on(trainer.max_epochs, trainer.max_steps):
            rank_zero_info(f"BatchNormFreezer: {self.plan(pl_module)}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        freeze, step = self._frozen, trainer.global_step
        self._step = step
        self._say(freeze.switch(self._is_on(trainer), step))
        # Only now: weights may still have been loaded in the module's own on_train_start.
        freeze.keep(averaged_copies(trainer))
        self._say(freeze.glance(step))
        if self.by_task:
            self._batch_task = self._task_of(batch, batch_idx)
            if self._same_tasks:
                # A layer that is held on one rank takes no part in what the others of its group wait for.
                agree_on_ranks(trainer, "freeze", lambda: ChannelLayout((), ()), {"task": self._batch_task})
            self._in_batch = True
            self._on_task(None)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before anyone takes a norm of them, as a clip_gradients by hand does.
        self._frozen.drop_own_gradients()
        if pl_module.automatic_optimization and not _has_lbfgs(trainer):
            # Not before: a checkpointed forward runs again in the backward. LBFGS and manual optimization run forwards
            # again for the same batch; there they are withheld until its end.
            self._frozen.train_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._frozen.drop_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # An optimizer that needs no gradient, or a hook of the module's, has moved what it moves.
        self._step = trainer.global_step
        self._say(self._frozen.glance(self._step))
        self._end_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_batch()
        self._mend(trainer.global_step)
        self._warn_of_unseen_tasks(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._end_batch()
        self._mend(trainer.global_step)
        # From here to the end averages may stand in the place of the weights: nothing is compared or put back.
        self._swapped = self._freeze is not None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._swapped = False
        self._mend(trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The tensors of the state dict are those of the model and of the average: put back there, they are right in the
        # file.
        self._mend(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(self._let_go(trainer.global_step))
        if self.report is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(
                {
                    "bn/frozen_layers": len(self.report.layers) + len(self.report.task_layers),
                    "bn/frozen_moved": len(self.report.moved),
                },
                step=trainer.global_step,
            )
        (rank_zero_info if self.report.identical else rank_zero_warn)(f"BatchNormFreezer: {self.report}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        # Called before on_save_checkpoint: what is found moved now is in the report of the same file.
        self._mend(self._step)
        report = self.report if self._freeze is None else self._freeze.report(self._step)
        return {"settings": self._settings(), "report": None if report is None else report.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Under another plan other layers were frozen: what became of those says nothing of these.
        if state_dict["report"] is not None and state_dict["settings"] == self._settings():
            self._resumed = FreezeReport.from_state_dict(state_dict["report"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks", {})
        saved = states.get(self.state_key)
        if saved is None:
            others = [key for key in states if key.startswith(type(self).__name__)]
            if others:
                rank_zero_warn(
                    f"BatchNormFreezer: the checkpoint was written with {quoted(others)} and knows no "
                    f"{self.state_key!r}: this run freezes as it is configured now, and counts from here."
                )
            return
        now, then = self._settings(), saved["settings"]
        changed = [f"{key} {then.get(key)!r} -> {now[key]!r}" for key in now if now[key] != then.get(key)]
        if changed:
            rank_zero_warn(
                f"BatchNormFreezer: the checkpoint was written under another plan ({'; '.join(changed)}): this run "
                f"freezes as it is configured now."
            )

    @property
    def _frozen(self) -> Freeze:
        if self._freeze is None:
            raise RuntimeError("BatchNormFreezer has seen no on_train_start: it works inside Trainer.fit only.")
        return self._freeze

    def _select(self, module: LightningModule) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        always, by_task = selections(self.modules, self.exclude, self.root, self.by_task)
        return select_by_task(module, always, by_task, stats=self.stats, affine=self.affine)

    def _layout(self, module: LightningModule) -> ChannelLayout:
        always, by_task = self._select(module)
        layers = batch_norm_layers(module)
        found = {name: layers[name] for name in always}
        of_tasks = {f"{name} in {task}": layers[name] for task, names in by_task.items() for name in names}
        return ChannelLayout.of({**found, **of_tasks})

    def _is_on(self, trainer: Trainer) -> bool:
        try:
            return self._schedule.is_on(trainer.current_epoch, trainer.global_step, trainer.max_epochs)
        except ValueError as error:
            raise MisconfigurationException(f"BatchNormFreezer: {error}") from error

    def _on_task(self, task: str | None) -> None:
        """The task of what runs next: that of the innermost context, else the batch's own."""
        if self._in_batch and self._freeze is not None and self._freeze.on:
            task = task if task is not None else self._batch_task
            if task is not None:
                self._tasks_seen.add(task)
            self._say(self._freeze.switch_task(task, self._step))

    def _end_batch(self) -> None:
        """Also where on_train_batch_end was not called: a module's on_train_batch_start may skip a batch."""
        self._in_batch = False
        if self._freeze is not None:
            self._say(self._freeze.switch_task(None, self._step))

    def _say(self, trips: list[Trip]) -> None:
        if not trips:
            return
        rank_zero_warn(f"BatchNormFreezer: a frozen value was moved and has been put back: {in_words(trips)}")

    def _warn_of_unseen_tasks(self, trainer: Trainer) -> None:
        """After the first epoch in which the freeze was on, not only at the end of days of training."""
        unseen = sorted(set(self.by_task or {}) - self._tasks_seen)
        if unseen and self._frozen.on and not self._said_unseen:
            rank_zero_warn(
                f"BatchNormFreezer: by_task names {quoted(unseen)}, but in epoch {trainer.current_epoch} no batch was "
                f"of such a task; tasks seen: {quoted(sorted(self._tasks_seen)) or 'none'}. Set task_key= to the key "
                f"of the batch that says it, or put `with lightning_bn.task(name):` around its part of the step."
            )
            self._said_unseen = True

    def _mend(self, step: int) -> None:
        if self._freeze is not None and not self._swapped:
            self._say(self._freeze.check(step))
            self._freeze.check_copies()

    def _let_go(self, step: int) -> list[Trip]:
        # Also after an exception inside validation, or in a later Trainer the layers would still be in eval.
        stop_listening(self._on_task)
        freeze, self._in_batch = self._freeze, False
        if freeze is None:
            return []
        if self._swapped:
            freeze.forget_values()
        trips = freeze.switch(False, step)
        self.report = freeze.report(step)
        self._freeze = None
        return trips

    def _settings(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

        return {
            "modules": plain(self.modules),
            "exclude": plain(self.exclude),
            "root": self.root,
            "stats": self.stats,
            "affine": self.affine,
            "schedule": str(self._schedule),
            "by_task": None if self.by_task is None else {task: plain(paths) for task, paths in self.by_task.items()},
        }


def _affine_cause(trainer: Trainer) -> str:
    return "LBFGS moves parameters that have no gradient" if _has_lbfgs(trainer) else ""


def _has_lbfgs(trainer: Trainer) -> bool:
    return any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers)
