"""Population statistics from batches (precise BN), written into the layers.

Batches are run forward, what the layers compute anyway is collected and pooled in float64, and everything but the
running statistics is afterwards as it was.
"""

from lightning_bn.functional.recalibration.checkpoint import recalibrate_checkpoint
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.recalibrated_checkpoint import RecalibratedCheckpoint
from lightning_bn.functional.recalibration.result import (
    AllFrozenError,
    FailedAloneError,
    NoUsableBatchError,
    Recalibration,
    RecalibrationError,
    WeightsMovedError,
)

__all__ = ["AllFrozenError", "FailedAloneError", "NoUsableBatchError", "RecalibratedCheckpoint", "Recalibration"]
__all__ += ["RecalibrationError", "WeightsMovedError", "recalibrate", "recalibrate_checkpoint"]
