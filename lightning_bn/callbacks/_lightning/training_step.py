"""What the training loop puts around a step: stage, loggers, transfer, precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.loggers.logger import DummyLogger

from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer

_SAYING = ("log_metrics", "log_hyperparams", "log_graph", "log_image", "save", "finalize", "after_save_checkpoint")


def _silent(logger: Any) -> Any:
    """Return a logger of the same class that says of itself what this one does, and drops what it is given."""
    nothing = dict.fromkeys(_SAYING, lambda self, *args, **kwargs: None)
    namespace = {**nothing, "experiment": property(lambda self: DummyLogger().experiment)}
    # Local by its name, so that LightningCLI does not take it for a second class that a configuration may mean.
    kind = type(logger)
    namespace |= {"__module__": kind.__module__, "__qualname__": f"_silent.<locals>.{kind.__name__}"}
    silent: Any = object.__new__(type(kind.__name__, (kind,), namespace))
    silent.__dict__.update(vars(logger))
    return silent


@contextmanager
def training_stage(trainer: Trainer) -> Iterator[None]:
    """The Trainer says that it is training, what is logged goes nowhere, and nobody stops it for good."""
    stage, loggers, should_stop = trainer.state.stage, trainer.loggers, trainer.should_stop
    trainer.training = True
    trainer.loggers = [_silent(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.state.stage, trainer.loggers, trainer.should_stop = stage, loggers, should_stop


def prepare_batch(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """The batch as the training loop would hand it to the step: converted, transferred, with the transfer hooks run."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def in_step_context(trainer: Trainer, step: Callable[[Any], Any], batch: Any) -> Any:
    """Run a step in the Trainer's precision."""
    with trainer.precision_plugin.train_step_context():
        return step(batch)
