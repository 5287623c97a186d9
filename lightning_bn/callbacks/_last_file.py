"""The file that a fit saves last is to hold what evaluation will use."""

from __future__ import annotations

from collections.abc import Callable

from lightning_bn.callbacks._lightning.averages import averages_in_place
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer, rank_zero_info
from lightning_bn.callbacks._lightning.saving import unwatch_saving, watch_saving
from lightning_bn.callbacks._lightning.state import is_over, was_interrupted


class LastFile:
    """Recalibrates before a file that is saved when training is over, and says so where the last one came too early.

    Args:
        is_late: Whether the layers hold something else than statistics of the weights of now.
        recalibrate: Makes them hold these.
    """

    def __init__(
        self, is_late: Callable[[Trainer], bool], recalibrate: Callable[[Trainer, LightningModule], None]
    ) -> None:
        self._is_late, self._recalibrate = is_late, recalibrate
        self._too_early: int | None = None

    def begin(self, trainer: Trainer) -> None:
        """Of a fit."""
        self._too_early = None
        watch_saving(trainer, self)

    def before_saving(self, trainer: Trainer) -> None:
        """The weights that a file holds are the averaged ones, where there are any."""
        if is_over(trainer) and not was_interrupted(trainer) and self._is_late(trainer):
            with averages_in_place(trainer, trainer.lightning_module):
                self._recalibrate(trainer, trainer.lightning_module)

    def after_saving(self, trainer: Trainer) -> None:
        """No end of training comes after an exception."""
        self._too_early = trainer.global_step if self._is_late(trainer) else None
        if was_interrupted(trainer):
            self.end(trainer)

    def end(self, trainer: Trainer) -> None:
        """Say what the last file holds, if that is not what it ought to."""
        unwatch_saving(trainer, self)
        if self._too_early is not None:
            rank_zero_info(
                f"PreciseBatchNorm: the last checkpoint, saved at step {self._too_early}, holds the moving average of "
                "that step, not precise statistics: recalibrate_checkpoint writes them into it"
            )
