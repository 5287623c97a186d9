"""What a Trainer is doing, and what it has."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_bn.callbacks._lightning.namespaces import Callback, MisconfigurationException, Trainer


def fits(trainer: Trainer) -> bool:
    """Whether this is a fit, sanity check and validations included."""
    return str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit"


def in_training_fit(trainer: Trainer) -> bool:
    """Whether this is a fit that counts: past the sanity check, and not barebones."""
    return fits(trainer) and not trainer.sanity_checking and not trainer.barebones


def has_validation_batches(trainer: Trainer) -> bool:
    """Whether this rank will validate anything."""
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0


def was_interrupted(trainer: Trainer) -> bool:
    """Whether an exception has ended the run, which callbacks are told of next."""
    return str(getattr(trainer.state.status, "value", trainer.state.status)) == "interrupted"


def is_over(trainer: Trainer) -> bool:
    """Whether no further batch will be trained on, as far as that is known."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if progress.processed < progress.ready:
        # In the middle of a batch, whose step is still to come.
        return False
    most = trainer.max_epochs
    epochs_are_over = most is not None and 0 <= most <= trainer.current_epoch + 1 and trainer.is_last_batch
    steps_are_over = 0 <= trainer.max_steps <= trainer.global_step
    return epochs_are_over or steps_are_over or (trainer.should_stop and trainer.fit_loop._can_stop_early)


def datamodule_of(trainer: Trainer) -> Any:
    """The datamodule, None without one."""
    return trainer.datamodule  # type: ignore[attr-defined]


def schedules(trainer: Trainer) -> list[dict[str, Any]]:
    """What a step could turn on optimizers and schedulers: hyperparameters by group, and the schedulers' attributes."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [*groups, *(vars(config.scheduler) for config in trainer.lr_scheduler_configs)]


def has_own_hook(module: nn.Module, name: str) -> bool:
    """Whether a LightningModule that no Trainer has fitted has a hook of its own of that name."""
    owner = next((kind for kind in type(module).__mro__ if name in vars(kind)), None)
    lightnings = any(kind.__name__ == "LightningModule" for kind in type(module).__mro__)
    of_library = owner is None or owner.__module__.partition(".")[0] in ("pytorch_lightning", "lightning")
    return lightnings and not of_library and getattr(module, "_trainer", None) is None


def synchronizes_batch_norm(trainer: Trainer) -> bool:
    """Whether the Trainer replaces BatchNorm by SyncBatchNorm."""
    return getattr(trainer._accelerator_connector, "_layer_sync", None) is not None


_SHARDING = {"FSDPStrategy", "XLAFSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


def refuse_strategy(trainer: Trainer, callback: Callback) -> None:
    """Raise where a strategy keeps pieces of the model on each rank, or its ranks cannot be asked.

    Raises:
        MisconfigurationException: With the strategy's name, the reason and the way out.
    """
    name, this = type(trainer.strategy).__name__, type(callback).__name__
    # By name: each of the two namespaces has classes of its own.
    sharding = [base.__name__ for base in type(trainer.strategy).__mro__ if base.__name__ in _SHARDING]
    if sharding:
        raise MisconfigurationException(
            f"{this} does not support {sharding[0]}, where each rank holds only parts of the parameters: this package "
            "reads, freezes and compares whole weights, and runs the module without its wrapper. Use strategy='ddp', "
            "or leave the callback out."
        )
    if trainer.world_size > 1 and not (dist.is_available() and dist.is_initialized()):
        raise MisconfigurationException(
            f"{this} does not support {name} with {trainer.world_size} processes: it has no torch.distributed process "
            "group, which the ranks need to agree. Use strategy='ddp' or one device, or leave the callback out."
        )
