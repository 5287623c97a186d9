"""What a monitor of a training finds: how far running statistics drift, which layers have a fault, and since when.

A :class:`MonitorSession` does all of it in a loop of one's own.
"""

from lightning_bn.functional.monitoring.finding_in_words import MonitorFinding, MonitorFindingKind
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.monitor_state import MonitorState
from lightning_bn.functional.monitoring.sample import Sample
from lightning_bn.functional.monitoring.session import MonitorSession
from lightning_bn.functional.monitoring.threshold import BatchNormDriftError

__all__ = [
    "BatchNormDriftError",
    "DriftHistory",
    "MonitorFinding",
    "MonitorFindingKind",
    "MonitorSession",
    "MonitorState",
    "Sample",
]
