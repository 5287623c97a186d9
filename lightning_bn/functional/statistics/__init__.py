"""Values of running statistics: copied, written back, merged, compared.

All channels of all layers lie in one tensor (ChannelLayout), so that a few vector operations serve however many layers
there are.
"""

from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.drift_measures import MEASURES, Measure, drift
from lightning_bn.functional.statistics.sample_moments import Moments, merge, moments, variance
from lightning_bn.functional.statistics.snapshots import Snapshot, restore_snapshot, take_snapshot
from lightning_bn.functional.statistics.summary import DriftSummary, summarize

__all__ = ["MEASURES", "ChannelLayout", "DriftSummary", "Measure", "Moments", "Snapshot", "drift", "merge", "moments"]
__all__ += ["restore_snapshot", "summarize", "take_snapshot", "variance"]
