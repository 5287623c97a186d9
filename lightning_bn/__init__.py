"""PyTorch Lightning callbacks around BatchNorm, on top of plain functions (``lightning_bn.functional``).

Callbacks and the metric are resolved when they are first asked for, so that ``import lightning_bn.functional`` loads no
Lightning.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bn.callbacks.cli import RecalibrateCommand
    from lightning_bn.callbacks.diagnosis import diagnose
    from lightning_bn.callbacks.freezer import BatchNormFreezer
    from lightning_bn.callbacks.monitor import BatchNormMonitor
    from lightning_bn.callbacks.precise import PreciseBatchNorm
    from lightning_bn.callbacks.tasks import TaskBatchNorm
    from lightning_bn.functional._tasks import task
    from lightning_bn.functional.doctor import Finding
    from lightning_bn.functional.monitoring import BatchNormDriftError
    from lightning_bn.metrics import BatchNormDrift

__all__ = ["BatchNormDrift", "BatchNormDriftError", "BatchNormFreezer", "BatchNormMonitor", "Finding"]
__all__ += ["PreciseBatchNorm", "RecalibrateCommand", "TaskBatchNorm", "__version__", "diagnose", "task"]

_HOME = {
    "BatchNormDrift": "lightning_bn.metrics",
    "BatchNormDriftError": "lightning_bn.functional.monitoring",
    "BatchNormFreezer": "lightning_bn.callbacks.freezer",
    "BatchNormMonitor": "lightning_bn.callbacks.monitor",
    "Finding": "lightning_bn.functional.doctor",
    "PreciseBatchNorm": "lightning_bn.callbacks.precise",
    "RecalibrateCommand": "lightning_bn.callbacks.cli",
    "TaskBatchNorm": "lightning_bn.callbacks.tasks",
    "diagnose": "lightning_bn.callbacks.diagnosis",
    "task": "lightning_bn.functional._tasks",
}

try:
    __version__ = version("lightning-bn")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
