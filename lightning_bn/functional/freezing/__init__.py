"""Layers kept as they are, and the verification that they were.

Frozen in place, for a block, or for a training as a session; planned by epoch and step, and reported.
"""

from lightning_bn.functional._tasks import RecomputationError
from lightning_bn.functional.freezing.change import Change
from lightning_bn.functional.freezing.freeze import freeze_batch_norm, frozen_batch_norm, unfreeze_batch_norm
from lightning_bn.functional.freezing.freeze_plan import FreezePlan, PlannedLayer, plan
from lightning_bn.functional.freezing.freeze_selection import FreezeSelection
from lightning_bn.functional.freezing.phase import FreezePhase
from lightning_bn.functional.freezing.proof import FreezeProof
from lightning_bn.functional.freezing.report import FreezeReport, Violation
from lightning_bn.functional.freezing.schedule import FreezeSchedule
from lightning_bn.functional.freezing.session import FreezeSession

__all__ = [
    "Change",
    "FreezePhase",
    "FreezePlan",
    "FreezeProof",
    "FreezeReport",
    "FreezeSchedule",
    "FreezeSelection",
    "FreezeSession",
    "PlannedLayer",
    "RecomputationError",
    "Violation",
    "freeze_batch_norm",
    "frozen_batch_norm",
    "plan",
    "unfreeze_batch_norm",
]
