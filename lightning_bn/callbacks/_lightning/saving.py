"""Files that a Trainer saves: what is to happen right before and after each of them."""

from __future__ import annotations

from typing import Any, Protocol

from lightning_bn.callbacks._lightning.namespaces import Trainer

_METHOD = "save_checkpoint"


class Saver(Protocol):
    """Who wants to know."""

    def before_saving(self, trainer: Trainer) -> None:
        """Before the weights are taken."""

    def after_saving(self, trainer: Trainer) -> None:
        """When the file is there."""


class _Saving:
    """In the place of ``trainer.save_checkpoint``: the method, between what others want to do.

    A callback's own hook comes after the weights were taken, and not at all for files of weights alone; and none comes
    between EarlyStopping's decision and the file that follows it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.save, self.savers = trainer, trainer.save_checkpoint, list[Saver]()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        for saver in tuple(self.savers):
            saver.before_saving(self.trainer)
        self.save(*args, **kwargs)
        for saver in tuple(self.savers):
            saver.after_saving(self.trainer)


def watch_saving(trainer: Trainer, saver: Saver) -> None:
    """Tell ``saver`` of every file that the Trainer saves from now on, once however often this is called."""
    saving = vars(trainer).get(_METHOD)
    if not isinstance(saving, _Saving):
        saving = vars(trainer)[_METHOD] = _Saving(trainer)
    if saver not in saving.savers:
        saving.savers.append(saver)


def unwatch_saving(trainer: Trainer, saver: Saver) -> None:
    """Tell it no more."""
    saving = vars(trainer).get(_METHOD)
    if isinstance(saving, _Saving) and saver in saving.savers:
        saving.savers.remove(saver)
        if not saving.savers:
            # What was there before, unless that is the class's own.
            del vars(trainer)[_METHOD]
            if trainer.save_checkpoint != saving.save:
                vars(trainer)[_METHOD] = saving.save
