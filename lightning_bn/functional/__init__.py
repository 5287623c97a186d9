"""The ground floor: what is done to BatchNorm layers, for any ``torch.nn.Module`` and without Lightning.

Each room lists what is public in it; all of it is imported from here.
"""

from lightning_bn.functional import (
    distributed,
    doctor,
    freezing,
    inspection,
    layers,
    monitoring,
    recalibration,
    statistics,
    tasks,
)
from lightning_bn.functional.distributed import *
from lightning_bn.functional.doctor import *
from lightning_bn.functional.freezing import *
from lightning_bn.functional.inspection import *
from lightning_bn.functional.layers import *
from lightning_bn.functional.monitoring import *
from lightning_bn.functional.recalibration import *
from lightning_bn.functional.statistics import *
from lightning_bn.functional.tasks import *

__all__: list[str] = []
__all__ += distributed.__all__
__all__ += doctor.__all__
__all__ += freezing.__all__
__all__ += inspection.__all__
__all__ += layers.__all__
__all__ += monitoring.__all__
__all__ += recalibration.__all__
__all__ += statistics.__all__
__all__ += tasks.__all__
