"""``recalibrate`` beside ``fit``, ``validate``, ``test`` and ``predict`` of a LightningCLI."""

from __future__ import annotations

from contextlib import closing
from typing import Any, Optional, Union

from lightning_bn.callbacks._lightning.namespaces import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_bn.callbacks._second_run.sources import batches_for
from lightning_bn.callbacks._second_run.step import check_step, isolated_step
from lightning_bn.functional.recalibration.checkpoint import recalibrate_checkpoint
from lightning_bn.functional.recalibration.recalibrated_checkpoint import RecalibratedCheckpoint
from lightning_bn.functional.recalibration.result import error_in_words
from lightning_bn.functional.recalibration.stopping import StoppingRule
from lightning_bn.functional.statistics.writable import check_out


class RecalibrateCommand:
    """Give a LightningCLI the subcommand ``recalibrate``: put it before LightningCLI among the bases.

    ``python cli.py recalibrate --config train.yaml --ckpt_path in.ckpt --out out.ckpt`` writes a copy of a checkpoint
    whose running statistics are those of the training data, with model and data of the YAML file that trained it. No
    weight changes, and everything else in the file stays as it is; a record of what was recalibrated, which
    ``lightning-bn inspect`` reads, is added where there is a place for it. With ``--average_with`` the average of
    several files (a "model soup") is recalibrated.

    Callbacks and loggers of the YAML file take no part, and nothing is trained.

    Raises:
        MisconfigurationException: If ``trainer_class`` is a function instead of a class.

    Example:
        >>> from pytorch_lightning.cli import LightningCLI
        >>> class MyCLI(RecalibrateCommand, LightningCLI):
        ...     pass
        >>> "recalibrate" in MyCLI.subcommands(MyCLI)
        True
    """

    trainer_class: Any

    def subcommands(self) -> dict[str, set[str]]:
        """Return the subcommands, each with the arguments that are not asked for."""
        return {**super().subcommands(), "recalibrate": {"model", "datamodule"}}  # type: ignore[misc]

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Build the parsers, for a Trainer that knows ``recalibrate``."""
        if not isinstance(self.trainer_class, type):
            raise MisconfigurationException(
                f"RecalibrateCommand needs a trainer_class that is a class, and not {self.trainer_class!r}."
            )
        name = self.trainer_class.__name__
        self.trainer_class = type(name, (_Recalibrating, self.trainer_class), {"__module__": __name__})
        super().setup_parser(*args, **kwargs)  # type: ignore[misc]


class _Recalibrating:
    """What a Trainer gets."""

    # LightningCLI shows these annotations, and the first line and the Args of the docstring, as help.
    def recalibrate(
        self,
        model: LightningModule,
        ckpt_path: Optional[str] = None,  # noqa: UP045
        out: Optional[str] = None,  # noqa: UP045
        average_with: Optional[Union[list[str], str]] = None,  # noqa: UP007, UP045
        num_batches: Optional[int] = 200,  # noqa: UP045
        num_samples: Optional[int] = None,  # noqa: UP045
        max_standard_error: Optional[float] = None,  # noqa: UP045
        step: str = "training_step",
        modules: Optional[Union[list[str], str]] = None,  # noqa: UP007, UP045
        exclude: Optional[Union[list[str], str]] = None,  # noqa: UP007, UP045
        root: str = "",
        key: Optional[str] = None,  # noqa: UP045
        prefix: Optional[str] = None,  # noqa: UP045
        recalibrate_frozen: bool = False,
        containers_in_eval: Optional[bool] = None,  # noqa: UP045
        overwrite: bool = False,
        weights_only: Optional[bool] = None,  # noqa: UP045
        datamodule: Any = None,
    ) -> RecalibratedCheckpoint:
        """Write a copy of a checkpoint with the running statistics of its weights on the training data.

        Args:
            model: Of the YAML file.
            ckpt_path: The checkpoint.
            out: The file to write.
            average_with: Further checkpoints of the same model: the average of all of them is recalibrated.
            num_batches: How many batches of the training data to use at most; null for an epoch.
            num_samples: How many samples to use at most.
            max_standard_error: Stop as soon as the standard error of every channel is below this; 0.05 is a good value.
            step: The method of the module that runs a batch.
            modules: Which BatchNorm layers, by path, glob or regular expression; null for all.
            exclude: Which of them not.
            root: Put before every path.
            key: Of the state dict in the file; null takes the one that fits.
            prefix: What the names in the file have before those of the model; null takes the one that fits.
            recalibrate_frozen: Whether to recalibrate layers too that the file records as frozen.
            containers_in_eval: Whether modules with others inside are in eval mode too, which ends dropout that they
                apply themselves; null leaves them in train mode, and says so if random numbers are drawn.
            overwrite: Whether the file to write may exist already.
            weights_only: Not used: nothing in a file is executed. It stands in YAML files that fit has saved.
            datamodule: Of the YAML file.

        Raises:
            MisconfigurationException: If a file is not named, or there are several processes.
            ValueError: As for recalibrate_checkpoint.
            OSError: As for recalibrate_checkpoint.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "weights_only")}
        done = recalibrated(self, **given)  # type: ignore[arg-type]
        print(done, error_in_words(done.recalibration), sep="\n")
        return done


def recalibrated(
    trainer: Trainer,
    model: LightningModule,
    datamodule: Any,
    ckpt_path: str | None,
    out: str | None,
    average_with: list[str] | str | None,
    num_batches: int | None,
    num_samples: int | None,
    max_standard_error: float | None,
    step: str,
    **options: Any,
) -> RecalibratedCheckpoint:
    """As ``recalibrate`` of a Trainer, which runs no other callback and no logger."""
    for name, value in (("--ckpt_path", ckpt_path), ("--out", out)):
        if not value:
            raise MisconfigurationException(f"recalibrate: name a file with {name}.")
    if trainer.world_size > 1:
        raise MisconfigurationException(
            f"recalibrate runs in one process, and the Trainer has {trainer.world_size}: add --trainer.devices=1 "
            f"--trainer.num_nodes=1."
        )
    check_out(str(out), options["overwrite"])
    check_step(model, step)
    rule = StoppingRule(num_batches, num_samples, max_standard_error)
    others = [average_with] if isinstance(average_with, str) else average_with or []
    once = _Once([str(ckpt_path), *others], str(out), step, rule, options)
    trainer.callbacks, trainer.loggers = [once], []  # type: ignore[attr-defined]
    trainer.num_sanity_val_steps = 0
    # Whatever the file says of how long to train: it ends before the first batch.
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 1, -1
    trainer.fit(model, datamodule=datamodule)
    if once.done is None and trainer.interrupted:
        raise KeyboardInterrupt
    if once.done is None:
        raise MisconfigurationException(
            "recalibrate: the Trainer has no batch to train on: look at limit_train_batches, overfit_batches and "
            "train_dataloader."
        )
    return once.done


class _Once(Callback):
    """Recalibrates where training would start, with the loaders, device and precision it would have, and ends it."""

    def __init__(self, paths: list[str], out: str, step: str, rule: StoppingRule, options: dict[str, Any]) -> None:
        self._paths, self._out, self._step, self._rule, self._options = paths, out, step, rule, options
        self.done: RecalibratedCheckpoint | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with isolated_step(trainer, pl_module, self._step, set()) as (forward, prepare, _):
            batches = batches_for(trainer, pl_module, "train", None, self._rule, prepare, ())
            with closing(batches):
                self.done = recalibrate_checkpoint(
                    self._paths,
                    pl_module,
                    batches,
                    self._out,
                    forward=forward,
                    num_batches=self._rule.num_batches,
                    num_samples=self._rule.num_samples,
                    max_standard_error=self._rule.max_standard_error,
                    **self._options,
                )
        trainer.fit_loop.max_epochs = 0
