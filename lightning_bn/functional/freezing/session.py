"""One training with frozen layers, with or without a Trainer: switched on and off, verified, repaired, told of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.functional._tasks import Listener
from lightning_bn.functional.freezing.baseline import Baseline
from lightning_bn.functional.freezing.change import Change
from lightning_bn.functional.freezing.eval_mode import pin_in_eval, release
from lightning_bn.functional.freezing.freeze import declare
from lightning_bn.functional.freezing.freeze_selection import FreezeSelection
from lightning_bn.functional.freezing.gradients import drop_gradients, drop_zero_gradients
from lightning_bn.functional.freezing.phase import FreezePhase
from lightning_bn.functional.freezing.report import FreezeReport, Violation, in_words
from lightning_bn.functional.freezing.task_freeze import TaskFreeze, parameters_of_all
from lightning_bn.functional.freezing.what_can_be_frozen import warn_of_initial_statistics
from lightning_bn.functional.layers.names import named_batch_norm
from lightning_bn.functional.layers.torch_private import AFFINE

CHECK_EVERY = 50
"""Batches after which all values are compared: ``F.batch_norm`` on a layer's buffers, say, leaves no version behind."""


class FreezeSession:
    """The layers that one owner freezes, switched on and off as a whole and by task, and their values verified.

    Args:
        model: Where the layers are.
        selection: What is frozen.
        owner: Who freezes; layers with several owners stay frozen until all of them have released them.
        before: What is known from before a resume.
        affine_cause: What changes ``weight`` and ``bias`` if nothing else is known to.
        tell: Called with violations that are new; by default they are warnings.

    Attributes:
        phase: Where it stands.
        step: Optimizer steps taken, as far as it was told.
        task_layers: Layers frozen during the batches of some tasks only, by name.
        tasks_seen: Tasks that were trained while it was on.

    Raises:
        SelectionError: As for :func:`~lightning_bn.functional.freeze_batch_norm`.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: FreezeSelection,
        *,
        owner: str = "FreezeSession",
        before: FreezeReport | None = None,
        affine_cause: str = "",
        tell: Callable[[Sequence[Violation]], None] | None = None,
    ) -> None:
        self._model, self._selection, self._owner = model, selection, owner
        self._values = {"stats": selection.stats, "affine": selection.affine}
        self._always, by_task = selection.layers(model)
        self._affine = parameters_of_all(self._always.values())
        self._tasks = TaskFreeze(by_task, **self._values, owner=owner, constant=selection.constant)
        self.task_layers = self._tasks.layers
        self._affine_cause, self._tell = affine_cause, tell or _warn
        self._before = before or FreezeReport(was_on=False)
        self._violations = {(one.change.layer, one.change.value): one for one in self._before.violations}
        self._steps = self._before.steps
        self.phase = FreezePhase.OFF
        self.step = self._batches = 0
        self._since: int | None = None
        self._baselines: list[Baseline] = []
        self._listener = Listener(self._enter_task, lambda: self._record(self._tasks.switch(None)))
        self.tasks_seen, self._hooks = set[str](), dict[str, RemovableHandle]()

    @property
    def on(self) -> bool:
        """Whether the layers are frozen."""
        return self.phase is not FreezePhase.OFF

    def switch(self, on: bool, step: int, *, warn: bool = True) -> None:
        """Freeze or unfreeze all layers together; what changed until then is compared a last time.

        Warns:
            UserWarning: With ``warn``, if statistics are frozen that are still those of construction.
        """
        self.step = step
        if on and not self.on:
            if self._selection.stats and warn:
                warn_of_initial_statistics({**self._always, **self.task_layers})
            self._since = step
            self._enter(FreezePhase.PINNED)
        elif self.on and not on:
            self.full_check()
            self._enter(FreezePhase.OFF)

    def start_batch(
        self, step: int, *, on: bool = True, task: str | None = None, averages: Iterable[tuple[nn.Module, bool]] = ()
    ) -> None:
        """Do what is due before a batch: switch, take the baseline if there is none, check, freeze by task.

        Args:
            step: Optimizer steps taken so far.
            on: Whether the layers are frozen in this batch.
            task: Which task the batch belongs to, where no :func:`lightning_bn.task` context says another.
            averages: Averages of the model, and whether each has been updated yet: one that has not will start as a
                copy of the model, so that the model's values are expected of it; another keeps its own.
        """
        self.switch(on, step)
        if self.phase is FreezePhase.PINNED:
            self._take_replaced()
            own = Baseline(self._always, **self._values)
            self._baselines = [own]
            for average, updated in averages:
                layers = named_batch_norm(average)
                copies = {name: layers[name] for name in self._always if name in layers}
                self._baselines.append(Baseline(copies, **self._values) if updated else own.for_layers(copies))
            self._enter(FreezePhase.VERIFIED)
            self._compare_with_checkpoint(own)
        self.quick_check()
        if self.task_layers:
            self._listener.batch_task = task
            self._listener.begin()

    def after_backward(self) -> None:
        """Drop the gradients of affine parameters frozen during every batch."""
        if self.on and self._selection.affine:
            drop_gradients(self._affine)

    def unblock_gradients(self) -> None:
        """Let forwards contribute to all gradients again, before the batch of a task ends."""
        self._tasks.unblock_gradients()

    def before_step(self) -> None:
        """Drop gradients before an optimizer step: of parameters of a task, those that nothing contributed to."""
        self.after_backward()
        if self.on and self._selection.affine:
            drop_zero_gradients(self._tasks.parameters)

    def end_batch(self, step: int) -> None:
        """Check after a batch, and release the layers of its task; harmless when repeated."""
        self.step = step
        self._batches += 1
        self.quick_check(thorough=self._batches % CHECK_EVERY == 0)
        self._listener.end()
        self._record(self._tasks.end_batch())

    def quick_check(self, *, thorough: bool = False) -> None:
        """Correct modes that somebody set, and run a full check if a value was touched, or differs in any bit."""
        if self.on and self._selection.stats:
            for name, layer in self._always.items():
                if layer.training:
                    layer.training = False
                    if name not in self._hooks:
                        # Who sets it directly once will do it again, between two batches and within one.
                        self._hooks[name] = layer.register_forward_pre_hook(_put_into_eval)
        own = self._baselines[0] if self.phase is FreezePhase.VERIFIED else None
        if own is not None and (own.touched() or (thorough and own.changes())):
            self.full_check()

    def full_check(self) -> None:
        """Compare all frozen values bit by bit, restore what changed, and tell what was not known before."""
        if self.phase is not FreezePhase.VERIFIED:
            return
        changes = [Change(name, "layer", cause="replaced by another layer") for name in self._take_replaced()]
        self._baselines[0] = self._baselines[0].for_layers(self._always) if changes else self._baselines[0]
        changes += self._baselines[0].changes()
        if changes:
            self._baselines[0].restore()
        else:
            self._baselines[0].rearm()
        for average in self._baselines[1:]:
            # No violation: an average of equal values drifts by its own rounding.
            if average.changes():
                average.restore()
        self._record(changes)

    def suspend(self) -> None:
        """Compare a last time before averages may stand in the place of the weights."""
        self.full_check()
        if self.phase is FreezePhase.VERIFIED:
            self._enter(FreezePhase.SUSPENDED)

    def resume(self) -> None:
        """Compare again: the weights are back in their place."""
        if self.phase is FreezePhase.SUSPENDED:
            self._enter(FreezePhase.VERIFIED)
            self.full_check()

    @contextmanager
    def allow_updates(self) -> Iterator[None]:
        """Inside, the layers are not frozen; afterwards they are, with the values they have then."""
        on, task = self.on, self._tasks.task
        self.switch(False, self.step)
        try:
            yield
        finally:
            self.switch(on, self.step)
            if on:
                self._record(self._tasks.switch(task))

    def close(self, step: int) -> FreezeReport:
        """Unfreeze all layers after a last check, and return the report; a session may be switched on again."""
        self._listener.end()
        self.switch(False, step)
        return self.report()

    def report(self, *, digests: bool = False) -> FreezeReport:
        """Return what became of the frozen values so far; for a checkpoint with digests of them."""
        return FreezeReport(
            layers=tuple(self._always),
            steps=self._steps + (self.step - self._since if self.on and self._since is not None else 0),
            violations=tuple(self._violations.values()),
            task_layers=tuple(self.task_layers),
            was_on=self._before.was_on or self._since is not None,
            task_batches=self._before.task_batches + self._tasks.batches,
            digests=self._baselines[0].digests() if digests and self._baselines else {},
            others=tuple(self._selection.lookalikes(self._model)),
        )

    def _enter(self, phase: FreezePhase) -> None:
        """Begin a phase: the one place where that happens."""
        if phase is FreezePhase.OFF:
            self._steps = self.report().steps
        left, self.phase = self.phase, phase
        every = {**self._always, **self.task_layers}
        if left is FreezePhase.OFF:
            # Layers of a task too: recalibrating them from batches of all tasks would undo what the freeze is for.
            declare(every, **self._values, owner=self._owner, frozen=True)
            self._pin(self._always)
            self.after_backward()
        elif phase is FreezePhase.OFF:
            self._record(self._tasks.end_batch())
            declare(self.task_layers, **self._values, owner=self._owner, frozen=False)
            self._release(self._always)
            for hook in self._hooks.values():
                hook.remove()
            self._baselines, self._hooks = [], {}

    def _enter_task(self, task: str | None) -> None:
        """Freeze by the task of what runs next."""
        if self.on:
            self.tasks_seen |= set() if task is None else {task}
            self._record(self._tasks.switch(task))

    def _take_replaced(self) -> list[str]:
        """Freeze layers that took the place of others of the same name instead of those; return their names."""
        now = named_batch_norm(self._model)
        new = {name: now[name] for name, layer in self._always.items() if now.get(name, layer) is not layer}
        old = {name: self._always[name] for name in new}
        self._always.update(new)
        of_tasks = {} if self._tasks.task is not None else self._tasks.take_replaced(now)
        declare(new | of_tasks, **self._values, owner=self._owner, frozen=True)
        self._pin(new, old)
        self._release(old)
        self._affine = parameters_of_all(self._always.values())
        return [*new, *of_tasks]

    def _compare_with_checkpoint(self, baseline: Baseline) -> None:
        """Tell of layers frozen from the first batch on, which the run before had frozen with other values."""
        then, cause = self._before.digests, "other values were frozen when the checkpoint was saved"
        now = baseline.digests() if then and not self._batches else {}
        self._record(Change(name, "values", cause=cause) for name in now if then.get(name, now[name]) != now[name])

    def _record(self, changes: Iterable[Change]) -> None:
        """Tell of changes of values that were not known to have changed before."""
        found = {(one.layer, one.value): Violation(self._explained(one), self.step) for one in changes}
        new = {key: violation for key, violation in found.items() if key not in self._violations}
        self._violations.update(new)
        if new:
            self._tell(list(new.values()))

    def _explained(self, change: Change) -> Change:
        flagged = "its training flag was set directly" if change.layer in self._hooks else ""
        cause = self._affine_cause if change.value in AFFINE else flagged
        return replace(change, cause=change.cause or cause)

    def _release(self, layers: Mapping[str, _BatchNorm]) -> None:
        declare(layers, **self._values, owner=self._owner, frozen=False)
        for layer in layers.values():
            release(layer, self._owner, as_found=True)

    def _pin(self, layers: Mapping[str, _BatchNorm], like: Mapping[str, _BatchNorm] | None = None) -> None:
        if self._selection.stats:
            for name, layer in layers.items():
                pin_in_eval(layer, self._owner, (like or {}).get(name), constant=self._selection.constant)


def _warn(violations: Sequence[Violation]) -> None:
    warnings.warn(f"a frozen value changed and was restored: {in_words(violations)}", stacklevel=2)


def _put_into_eval(layer: nn.Module, _: Any) -> None:
    layer.training = False
