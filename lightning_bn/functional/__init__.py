"""The ground floor: what is done to BatchNorm layers, for any ``torch.nn.Module`` and without Lightning."""

from lightning_bn.functional.freezing.freeze import freeze_batch_norm, frozen_batch_norm, unfreeze_batch_norm
from lightning_bn.functional.freezing.freeze_plan import FreezePlan, PlannedLayer, plan
from lightning_bn.functional.freezing.schedule import FreezeSchedule
from lightning_bn.functional.layers.behavior import LayerBehavior, describe
from lightning_bn.functional.layers.patterns import SelectionError
from lightning_bn.functional.layers.selection import batch_norm_layers, tracked_layers
from lightning_bn.functional.layers.status import LayerStatus, is_frozen, layer_status
from lightning_bn.functional.recalibration.checkpoint import RecalibratedCheckpoint, recalibrate_checkpoint
from lightning_bn.functional.recalibration.precise_bn import recalibrate
from lightning_bn.functional.recalibration.result import Recalibration, RecalibrationError
from lightning_bn.functional.statistics.drift_measures import MEASURES, Measure, drift
from lightning_bn.functional.statistics.sample_moments import Moments, merge, moments, variance
from lightning_bn.functional.statistics.snapshots import Snapshot, restore_snapshot, take_snapshot
from lightning_bn.functional.statistics.summary import DriftSummary, summarize

__all__ = [
    "MEASURES",
    "DriftSummary",
    "FreezePlan",
    "FreezeSchedule",
    "LayerBehavior",
    "LayerStatus",
    "Measure",
    "Moments",
    "PlannedLayer",
    "RecalibratedCheckpoint",
    "Recalibration",
    "RecalibrationError",
    "SelectionError",
    "Snapshot",
    "batch_norm_layers",
    "describe",
    "drift",
    "freeze_batch_norm",
    "frozen_batch_norm",
    "is_frozen",
    "layer_status",
    "merge",
    "moments",
    "plan",
    "recalibrate",
    "recalibrate_checkpoint",
    "restore_snapshot",
    "summarize",
    "take_snapshot",
    "tracked_layers",
    "unfreeze_batch_norm",
    "variance",
]
