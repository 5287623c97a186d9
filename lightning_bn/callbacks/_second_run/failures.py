"""A recalibration that cannot be made: a warning, and the run goes on as it would have without, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_bn.callbacks._lightning.namespaces import (
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_bn.callbacks._lightning.state import in_training_fit
from lightning_bn.callbacks._second_run.step import OTHER_STEPS
from lightning_bn.functional._text import counted
from lightning_bn.functional.layers.patterns import SelectionError
from lightning_bn.functional.recalibration import result


@contextmanager
def failures_told(trainer: Trainer, step: str, selected: Callable[[], int]) -> Iterator[None]:
    """Warn of what the run can go on without.

    Args:
        trainer: Of the run.
        step: That is run inside.
        selected: How many layers are selected.

    Raises:
        MisconfigurationException: If the step moved weights.
        RecalibrationError: On several ranks, of which none can go on alone.
    """
    try:
        yield
    except result.AllFrozenError:
        layers = counted(selected(), "selected layer")
        rank_zero_info(f"PreciseBatchNorm: {layers}, all frozen: nothing to recalibrate")
    except SelectionError as error:
        # Right when the fit began: a layer was taken out of the model since.
        if not in_training_fit(trainer):
            raise
        rank_zero_warn(f"PreciseBatchNorm: {error}")
    except result.WeightsMovedError as error:
        raise MisconfigurationException(f"PreciseBatchNorm(step={step!r}): {error} {OTHER_STEPS}") from error
    except result.RecalibrationError as error:
        if trainer.world_size > 1 and not isinstance(error, result.NoUsableBatchError):
            # The other ranks end with an error too.
            raise
        rank_zero_warn(f"PreciseBatchNorm: {error}")
