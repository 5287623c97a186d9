"""What a Trainer is doing, and what it has."""

from __future__ import annotations

from typing import Any

from lightning_bn.callbacks._lightning.namespaces import Callback, MisconfigurationException, Trainer


def in_training_fit(trainer: Trainer) -> bool:
    """Whether this is a fit that counts: past the sanity check, and not barebones."""
    fitting = str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit"
    return fitting and not trainer.sanity_checking and not trainer.barebones


def has_validation_batches(trainer: Trainer) -> bool:
    """Whether this rank will validate anything."""
    return trainer.enable_validation and sum(trainer.num_val_batches) > 0


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether training ends with this epoch, as far as that is known at its end."""
    most = trainer.max_epochs
    epochs_are_over = most is not None and 0 <= most <= trainer.current_epoch + 1
    steps_are_over = 0 <= trainer.max_steps <= trainer.global_step
    return epochs_are_over or steps_are_over or trainer.should_stop


def datamodule_of(trainer: Trainer) -> Any:
    """The datamodule, None without one."""
    return trainer.datamodule  # type: ignore[attr-defined]


def several_loaders(trainer: Trainer) -> bool:
    """Whether training batches are combined from more than one loader."""
    combined = trainer.fit_loop._combined_loader
    return combined is not None and len(combined.flattened) > 1


def schedules(trainer: Trainer) -> list[dict[str, Any]]:
    """What a step could turn on optimizers and schedulers: hyperparameters by group, and the schedulers' attributes."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [*groups, *(vars(config.scheduler) for config in trainer.lr_scheduler_configs)]


_SHARDING = {"FSDPStrategy", "XLAFSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}


def refuse_sharded(trainer: Trainer, callback: Callback) -> None:
    """Raise where a strategy keeps pieces of the model on each rank.

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
