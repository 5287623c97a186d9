"""Both namespaces of Lightning, ``pytorch_lightning`` and ``lightning.pytorch``, as one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

import pytorch_lightning as pl
from lightning_utilities.core import rank_zero
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from lightning_bn.callbacks._lightning import LOG

__all__ = ["NOT_THE_DATASETS_OWN", "NOT_THE_MODULES_OWN", "Callback", "LightningModule", "MisconfigurationException"]
__all__ += ["Trainer", "rank_zero_info", "rank_zero_warn"]

Trainer: TypeAlias = pl.Trainer
LightningModule: TypeAlias = pl.LightningModule

_HAS_LIGHTNING = find_spec("lightning") is not None and find_spec("lightning.pytorch") is not None


if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:

    def _callback_bases() -> tuple[type, ...]:
        # pytorch_lightning and lightning.pytorch are two copies of one code with unrelated classes; a callback of both
        # is accepted by either Trainer and either LightningCLI. `lightning` always brings `pytorch-lightning`.
        if not _HAS_LIGHTNING:
            return (pl.Callback,)
        from lightning.pytorch import Callback as LightningCallback

        return (pl.Callback, LightningCallback)

    Callback = type(
        "Callback", _callback_bases(), {"__module__": __name__, "__doc__": "A callback of both namespaces."}
    )


def _of_both_namespaces() -> tuple[type, ...]:
    kinds: tuple[type, ...] = (pl.Trainer, pl.LightningDataModule, pl.Callback, Logger)
    if _HAS_LIGHTNING:
        from lightning.pytorch import Callback as LightningCallback
        from lightning.pytorch import LightningDataModule
        from lightning.pytorch import Trainer as LightningTrainer
        from lightning.pytorch.loggers import Logger as LightningLogger

        kinds += (LightningTrainer, LightningDataModule, LightningCallback, LightningLogger)
    return kinds


if LOG is not None:
    # The last of the two namespaces that is imported names the logger of both; an import of ours changes nothing.
    rank_zero.log = LOG

NOT_THE_DATASETS_OWN = (*_of_both_namespaces(), Optimizer, LRScheduler)
"""What a dataset may refer to and does not hold."""
NOT_THE_MODULES_OWN = (*NOT_THE_DATASETS_OWN, DataLoader, Dataset)
"""What a module may refer to and does not hold."""
