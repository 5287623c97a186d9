"""BatchNorm layers of configured submodules kept frozen through a fit, and verified to have been."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.optim import LBFGS

from lightning_bn.callbacks._base import BatchNormCallback
from lightning_bn.callbacks._lightning.averages import averaged_copies
from lightning_bn.callbacks._lightning.callback_list import put_first
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from lightning_bn.callbacks._ranks import agree_on_ranks
from lightning_bn.callbacks._task_of import TaskOf
from lightning_bn.functional._checks import check_text
from lightning_bn.functional._text import quoted
from lightning_bn.functional.freezing.freeze_plan import FreezePlan, plan_of
from lightning_bn.functional.freezing.freeze_selection import FreezeSelection
from lightning_bn.functional.freezing.report import FreezeReport, Violation, in_words
from lightning_bn.functional.freezing.schedule import FreezeSchedule
from lightning_bn.functional.freezing.session import FreezeSession
from lightning_bn.functional.layers.properties import processes_of
from lightning_bn.functional.statistics.channels import ChannelLayout


class BatchNormFreezer(BatchNormCallback):
    """Keep running statistics and affine parameters of the BatchNorm layers of some submodules fixed during a fit.

    Statistics: the layers normalize with their running statistics in training too, and stay so through any
    ``.train()``. Affine: their gradients are dropped before every optimizer step; the parameters stay in their
    optimizer groups and keep ``requires_grad``, for distributed training, resuming and unfreezing. Whatever else
    changes a frozen value is noticed, restored and reported; at the end of the fit all are compared bit by bit.

    Only BatchNorm is frozen; other weights below the same paths train on.

    Args:
        modules: Which BatchNorm layers, as for `lightning_bn.functional.batch_norm_layers`: module paths such as
            `["vfe", "backbone_2d.blocks"]`, globs or regular expressions. None for all, or with `by_task` for none
            beside the tasks' own.
        exclude: Which of them not.
        root: Put before every path, for instance `"model"` where the network is in `self.model`.
        stats: Whether to freeze running statistics.
        affine: Whether to freeze `weight` and `bias`.
        start_epoch: First epoch in which they are frozen, from 0; a negative one counts from `max_epochs`: -20 is the
            last 20 epochs.
        stop_epoch: First epoch in which they no longer are; a negative one counts from `max_epochs`.
        start_step: First optimizer step (`trainer.global_step`) in which they are frozen.
        stop_step: First optimizer step in which they no longer are.
        by_task: Further modules for each task, frozen while a batch of that task is trained: their statistics do not
            move, and that batch contributes nothing to the gradients of their `weight` and `bias`.
        task_key: Where the task of a batch is found: a key of the batch, or the import path of a function of batch and
            batch index. For steps that serve several tasks at once, use `lightning_bn.task` inside the step.
        memory_efficient: Whether frozen layers keep nothing of their inputs for the backward, as for
            `freeze_batch_norm`; None for wherever `stats` and `affine` are both frozen.
        name: Tells this freezer from another one in the same Trainer, which refuses two of one name.

    Attributes:
        report: What became of the frozen values; None before a fit.

    Raises:
        MisconfigurationException: If nothing is to be frozen, if the schedule can never be on, if ``task_key`` leads
            nowhere, or if two freezers of one Trainer have the same ``name``.
        SelectionError: When the fit starts, if the selection means no layer or one without running statistics.

    Source: Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 4, on fine-tuning.
    """

    def __init__(
        self,
        modules: str | Sequence[str] | None = None,
        *,
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
        memory_efficient: bool | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        with self._checked():
            self._select(modules, exclude, root, name)
            check_text("task_key", task_key, none="where contexts name the task")
            if task_key is not None and not by_task:
                raise ValueError(f"task_key={task_key!r} has no effect without by_task=: give both or none.")
            self._chosen = FreezeSelection(modules, exclude, root, by_task, stats, affine, memory_efficient)
            self._schedule = FreezeSchedule(start_epoch, stop_epoch, start_step, stop_step)
        self._settings = {**self._chosen.settings(), "schedule": str(self._schedule)}
        self.stats, self.affine, self.memory_efficient = stats, affine, memory_efficient
        self.by_task, self.task_key = by_task, task_key
        self.start_epoch, self.stop_epoch = start_epoch, stop_epoch
        self.start_step, self.stop_step = start_step, stop_step
        self.report: FreezeReport | None = None
        self._task_of = TaskOf(task_key)
        self._session: FreezeSession | None = None
        self._resumed: FreezeReport | None = None
        self._tasks_are_synchronized = self._warned_of_unseen = False

    def plan(self, model: nn.Module) -> FreezePlan:
        """Return what this freezer will do to ``model``, layer by layer; nothing is changed.

        Raises:
            SelectionError: If the selection means no layer or one without running statistics.
        """
        return plan_of(model, self._chosen, self._schedule)

    @contextmanager
    def allow_updates(self) -> Iterator[None]:
        """Inside, the layers are not frozen and may be given new values; afterwards those are the frozen ones."""
        with self._session.allow_updates() if self._session else nullcontext():
            yield

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            # What a run of validate read is not this fit's; what this fit resumes from is read later.
            self._resumed = None
        # In front of WeightAveraging, whose on_train_end puts the average in the place of what is compared here.
        put_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer)
        self.report = None
        self._is_on(trainer)  # or refuse a schedule that cannot be told
        # Ranks that train a layer which others keep frozen would drift apart without a word.
        settings = {"stats": self.stats, "affine": self.affine, "when": str(self._schedule)}
        agree_on_ranks(trainer, "freeze", lambda: self._chosen.layout(pl_module), settings)
        if self._schedule.never_on(trainer.max_epochs, trainer.max_steps):
            # No error: the first part of a training that is resumed with more epochs looks like this.
            rank_zero_info(
                f"BatchNormFreezer: nothing will be frozen in this fit: {self._schedule} is not reached with "
                f"max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps}"
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A module that goes into train mode in there would move pre-trained statistics before anything is frozen.
        if self.stats and self._is_on(trainer):
            always, by_task = self._chosen.layers(pl_module)
            names = {name for layers in (always, *by_task.values()) for name in layers}
            every = FreezeSelection([f"re:{re.escape(name)}" for name in names], affine=False)
            self._session = FreezeSession(pl_module, every, owner=self.state_key, tell=_warn)
            self._session.switch(True, 0, warn=False)
            self._session.start_batch(0)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            # Not kept frozen: Lightning would warn of modules in eval mode.
            self._session.close(0)
            self._session = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: Lightning would warn of modules in eval mode, and layers may be replaced after on_fit_start.
        self._session = FreezeSession(
            pl_module,
            self._chosen,
            owner=self.state_key,
            before=self._resumed,
            affine_cause="LBFGS changes parameters that have no gradient" if _has_lbfgs(trainer) else "",
            tell=_warn,
        )
        self._resumed, self._warned_of_unseen = None, False
        task_layers = self._session.task_layers.values()
        self._tasks_are_synchronized = self.stats and any(processes_of(layer) > 1 for layer in task_layers)
        self._session.switch(self._is_on(trainer), trainer.global_step)
        if not self._schedule.never_on(trainer.max_epochs, trainer.max_steps):
            rank_zero_info(f"BatchNormFreezer: {self.plan(pl_module)}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._session is None:
            return
        task = self._task_of(batch, batch_idx)
        if self._tasks_are_synchronized:
            # A layer that is pinned on one rank takes no part in what the others of its group wait for.
            agree_on_ranks(trainer, "freeze", lambda: ChannelLayout((), ()), {"task": task})
        on, averages = self._is_on(trainer), averaged_copies(trainer)
        self._session.start_batch(trainer.global_step, on=on, task=task, averages=averages)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is None:
            return
        # Before anyone takes a norm of them, as a clip_gradients by hand does.
        self._session.after_backward()
        if pl_module.automatic_optimization and not _has_lbfgs(trainer):
            # Not before: a checkpointed forward runs again in the backward. LBFGS and manual optimization run forwards
            # again for the same batch; there they are blocked until its end.
            self._session.unblock_gradients()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._session is not None:
            self._session.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # An optimizer that needs no gradient, or a hook of the module's, has changed what it changes.
        if self._session is not None:
            self._session.end_batch(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is None:
            return
        # Where a module's on_train_batch_start skipped the last batch, on_train_batch_end was not called.
        self._session.end_batch(trainer.global_step)
        self._session.full_check()
        # After the first epoch in which the freeze was on, not only at the end of days of training.
        seen = self._session.tasks_seen
        unseen = sorted({*(self.by_task or {})} - seen)
        if unseen and self._session.on and not self._warned_of_unseen:
            rank_zero_warn(
                f"BatchNormFreezer: by_task names {quoted(unseen)}, but no batch in epoch {trainer.current_epoch} was "
                f"of that task; tasks seen: {quoted(sorted(seen)) or 'none'}. Set task_key= to the key of the batch "
                "that holds the task, or put `with lightning_bn.task(name):` around the task's part of the step."
            )
            self._warned_of_unseen = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session and not trainer.sanity_checking:
            self._session.end_batch(trainer.global_step)
            # From here to the end averages may stand in the place of the weights.
            self._session.suspend()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session and not trainer.sanity_checking:
            self._session.resume()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The tensors of the state dict are those of the model and of the average: restored there, they are right here.
        if self._session:
            self._session.full_check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer)
        if self.report is None:
            return
        layers = len(self.report.layers) + len(self.report.task_layers)
        self._log_curves(trainer, {"bn/frozen_layers": layers, "bn/frozen_violations": len(self.report.violations)})
        (rank_zero_info if self.report.identical else rank_zero_warn)(f"BatchNormFreezer: {self.report}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        report = self.report
        if self._session:
            # Called before on_save_checkpoint: what is found changed now is in the report of the same file.
            self._session.full_check()
            report = self._session.report(digests=True)
        return {"format": 1, "settings": self._settings, "report": report.state_dict() if report else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Under another plan other layers were frozen: what became of those says nothing of these.
        if state_dict.get("report") and not self._settings_changed(state_dict):
            self._resumed = FreezeReport.from_state_dict(state_dict["report"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks", {})
        others = self._known_under_other_names(checkpoint)
        changed = self._settings_changed(states.get(self.state_key, {}))
        if changed:
            rank_zero_warn(
                f"BatchNormFreezer: the checkpoint was written under another plan ({'; '.join(changed)}): this run "
                f"freezes as it is configured now."
            )
        elif others:
            rank_zero_warn(
                f"BatchNormFreezer: the checkpoint was written with {quoted(others)} and has no state of "
                f"{self.state_key!r}: this run freezes as it is configured now, and reports only on its own steps."
            )

    def _is_on(self, trainer: Trainer) -> bool:
        with self._checked():
            return self._schedule.is_on(trainer.current_epoch, trainer.global_step, trainer.max_epochs)

    def _close(self, trainer: Trainer) -> None:
        # Also after an exception inside validation, or in a later Trainer the layers would still be in eval.
        if self._session is not None:
            self.report = self._session.close(trainer.global_step)
            self._session = None

    def _settings_changed(self, state: dict[str, Any]) -> list[str]:
        """Return which settings differ from those in a saved state; one that is not in there is the same."""
        then = state.get("settings", {})
        return [f"{key} {then[key]!r} -> {now!r}" for key, now in self._settings.items() if then.get(key, now) != now]


def _warn(violations: Sequence[Violation]) -> None:
    rank_zero_warn(f"BatchNormFreezer: a frozen value changed and was restored: {in_words(violations)}")


def _has_lbfgs(trainer: Trainer) -> bool:
    return any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers)
