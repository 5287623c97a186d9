"""What is known of Lightning: both its namespaces, and its private or version-bound parts. Nothing else imports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

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


NOT_THE_MODULES_OWN = (*_of_both_namespaces(), DataLoader, Dataset, Optimizer, LRScheduler)
"""What a module may refer to and does not hold."""


def in_training_fit(trainer: Trainer) -> bool:
    """Whether this is a fit that counts: past the sanity check, and not barebones."""
    fitting = str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit"
    return fitting and not trainer.sanity_checking and not trainer.barebones


_SHARDING = {"FSDPStrategy", "XLAFSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


def refuse_sharded(trainer: Trainer, callback: Callback) -> None:
    """Raises where a strategy keeps pieces of the model on each rank.

    Raises:
        MisconfigurationException: With the strategy's name, the reason and the way out.
    """
    # By name: each of the two namespaces has classes of its own.
    sharding = [base.__name__ for base in type(trainer.strategy).__mro__ if base.__name__ in _SHARDING]
    if sharding:
        raise MisconfigurationException(
            f"{type(callback).__name__} does not support {sharding[0]}: each rank holds pieces of the parameters "
            f"there, where this package reads, freezes and compares whole weights, and runs the module without its "
            f"wrapper. Use strategy='ddp', or leave the callback out."
        )


def has_validation_batches(trainer: Trainer) -> bool:
    """Whether this rank will validate anything."""
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0


def same_kind_beside(trainer: Trainer, callback: Callback) -> list[Any]:
    """Other callbacks of the same class in the Trainer."""
    return [other for other in _callbacks(trainer) if type(other) is type(callback) and other is not callback]


def averaged_copies(trainer: Trainer) -> list[tuple[nn.Module, bool]]:
    """Averages of the module that WeightAveraging callbacks keep beside it, and whether each has been updated yet."""
    copies = []
    for callback in _callbacks(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            copies.append((average.module, bool(average.n_averaged)))
    return copies


@contextmanager
def averages_in_place(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, the average that WeightAveraging keeps and the module have changed places, as they do in validation."""
    copies = [copy for copy, updated in averaged_copies(trainer) if updated]
    for copy in copies[:1]:
        _swap(module, copy)
    try:
        yield
    finally:
        for copy in copies[:1]:
            _swap(module, copy)


def _swap(module: nn.Module, copy: nn.Module) -> None:
    pairs = zip(chain(module.parameters(), module.buffers()), chain(copy.parameters(), copy.buffers()), strict=True)
    for mine, other in pairs:
        kept = mine.data.clone()
        mine.data.copy_(other.data)
        other.data.copy_(kept)


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether training ends with this epoch, as far as that is known at its end."""
    most = trainer.max_epochs
    epochs_are_over = most is not None and 0 <= most <= trainer.current_epoch + 1
    steps_are_over = 0 <= trainer.max_steps <= trainer.global_step
    return epochs_are_over or steps_are_over or trainer.should_stop


def is_barebones(trainer: Trainer) -> bool:
    """Whether the Trainer was told to do nothing but train."""
    return bool(trainer.barebones)


def _callbacks(trainer: Trainer) -> list[Any]:
    # Set by one of the Trainer's connectors, so that type checkers do not know it.
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def _set_callbacks(trainer: Trainer, callbacks: list[Any]) -> None:
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def put_first(trainer: Trainer, callback: Callback) -> None:
    """Moves a callback in front of all others."""
    _set_callbacks(trainer, [callback, *(other for other in _callbacks(trainer) if other is not callback)])


def put_before_checkpoints(trainer: Trainer, callback: Callback) -> None:
    """Moves a callback behind all others but those that save checkpoints, which come last."""
    others = [other for other in _callbacks(trainer) if other is not callback]
    # By name: each of the two namespaces has its own class.
    saving = [other for other in others if any(base.__name__ == "Checkpoint" for base in type(other).__mro__)]
    rest = [other for other in others if other not in saving]
    _set_callbacks(trainer, [*rest, callback, *saving])


def log_figure(trainer: Trainer, draw: Callable[[], Any], name: str) -> None:
    """Saves a figure in the log directory and hands it to the loggers that take images; nothing without matplotlib.

    Args:
        trainer: Of the run; only its rank 0 may call this.
        draw: Makes the ``matplotlib.figure.Figure``.
        name: Of the file and the image.
    """
    if find_spec("matplotlib") is None:
        return
    folders = [folder for logger in trainer.loggers if (folder := _folder_of(logger))]
    if not folders:
        return
    figure = draw()
    path = folders[0] / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    rank_zero_info(f"figure: {path}")
    for logger in trainer.loggers:
        # By what they can do: each of the two namespaces has its own classes.
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, global_step=trainer.global_step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(path)], step=trainer.global_step)


def _folder_of(logger: Any) -> Path | None:
    """Where a run's files are, as ModelCheckpoint has it."""
    if logger.log_dir:
        return Path(logger.log_dir)
    return Path(logger.save_dir) / str(logger.name) / str(logger.version) if logger.save_dir else None


def datamodule_of(trainer: Trainer) -> Any:
    """The datamodule, None without one."""
    return trainer.datamodule  # type: ignore[attr-defined]


def several_loaders(trainer: Trainer) -> bool:
    """Whether training batches are combined from more than one loader."""
    combined = trainer.fit_loop._combined_loader
    return combined is not None and len(combined.flattened) > 1


def train_loaders(trainer: Trainer) -> tuple[Any, str]:
    """The Trainer's own processed training loaders (with its distributed samplers) and how they are combined.

    Raises:
        MisconfigurationException: If there is no training loader.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        raise MisconfigurationException("the Trainer has no training loader: there is nothing to recalibrate from.")
    return combined.iterables, combined._mode


@contextmanager
def combined(loaders: Any, mode: str) -> Iterator[Iterator[Any]]:
    """Batches of loaders combined as the Trainer combines them; their workers end with the context."""
    loader = CombinedLoader(loaders, mode)  # type: ignore[arg-type]
    try:
        yield (batch for batch, _, _ in iter(loader))
    finally:
        loader.reset()


class _SilentLogger(DummyLogger):
    """Drops what it is given and says of itself what the logger says in whose place it stands."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    @property
    def save_dir(self) -> Any:
        return self._logger.save_dir

    @property
    def log_dir(self) -> Any:
        return self._logger.log_dir

    @property
    def root_dir(self) -> Any:
        return self._logger.root_dir

    @property
    def name(self) -> Any:
        return self._logger.name

    @property
    def version(self) -> Any:
        return self._logger.version


@contextmanager
def training_stage(trainer: Trainer) -> Iterator[None]:
    """The Trainer says that it is training, what is logged goes nowhere, and nobody stops it for good."""
    stage, loggers, should_stop = trainer.state.stage, trainer.loggers, trainer.should_stop
    trainer.training = True
    trainer.loggers = [_SilentLogger(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.state.stage, trainer.loggers, trainer.should_stop = stage, loggers, should_stop


def prepare_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch as the training loop would hand it to the step: converted, transferred, with the transfer hooks run."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def schedules(trainer: Trainer) -> list[Any]:
    """What a step could turn on optimizers and schedulers: hyperparameters by group, and the schedulers."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [*groups, *(config.scheduler for config in trainer.lr_scheduler_configs)]


def in_step_context(trainer: Trainer, step: Callable[[Any], Any], batch: Any) -> Any:
    """Runs a step in the Trainer's precision."""
    with trainer.precision_plugin.train_step_context():
        return step(batch)


__all__ = [
    "NOT_THE_MODULES_OWN",
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "averaged_copies",
    "averages_in_place",
    "combined",
    "datamodule_of",
    "has_validation_batches",
    "in_step_context",
    "in_training_fit",
    "is_barebones",
    "is_last_epoch",
    "log_figure",
    "prepare_batch",
    "put_before_checkpoints",
    "put_first",
    "rank_zero_info",
    "rank_zero_warn",
    "refuse_sharded",
    "same_kind_beside",
    "schedules",
    "several_loaders",
    "train_loaders",
    "training_stage",
]
