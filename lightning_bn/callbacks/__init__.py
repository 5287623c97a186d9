"""The first floor: callbacks, which decide when what :mod:`lightning_bn.functional` can do is done."""

from lightning_bn.callbacks.freezer import BatchNormFreezer
from lightning_bn.callbacks.monitor import BatchNormMonitor
from lightning_bn.callbacks.precise import PreciseBatchNorm

__all__ = ["BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm"]
