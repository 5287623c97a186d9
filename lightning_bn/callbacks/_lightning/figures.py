"""Figures in the log directory and in loggers that take images."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_bn.callbacks._lightning.namespaces import Trainer, rank_zero_info


def log_figure(trainer: Trainer, draw: Callable[[], Any], name: str) -> None:
    """Save a figure in the log directory and hand it to the loggers that take images; nothing without matplotlib.

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
