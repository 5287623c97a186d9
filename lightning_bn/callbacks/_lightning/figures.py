"""What is shown at the end of a fit, which is never ended by it: tables, and figures in log directories and loggers."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import fsspec
from rich.console import Console

from lightning_bn._tables import LayerTable
from lightning_bn.callbacks._lightning.namespaces import Callback, Trainer, rank_zero_info, rank_zero_warn


@contextmanager
def not_ending_the_fit(callback: Callback, what: str) -> Iterator[None]:
    """What fails inside is one warning: a training is not lost over a table or a figure of it."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{type(callback).__name__}: {what} could not be made ({type(error).__name__}: {error})")


def print_table(table: LayerTable) -> None:
    """Print a table, with question marks for what the terminal cannot show."""
    console = Console()
    with console.capture() as printed:
        console.print(table)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(printed.get().encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def log_figure(trainer: Trainer, draw: Callable[[], Any], name: str) -> None:
    """Save a figure in the log directory, local or remote, and hand it to the loggers that take images.

    Args:
        trainer: Of the run; only its rank 0 may call this.
        draw: Makes the ``matplotlib.figure.Figure``.
        name: Of the file and the image.
    """
    folders = [folder for logger in trainer.loggers if (folder := _folder_of(logger))]
    if not folders:
        return
    if find_spec("matplotlib") is None:
        rank_zero_info("BatchNormMonitor: no figure without matplotlib: pip install 'lightning-bn[plot]'")
        return
    figure, image, path = draw(), io.BytesIO(), f"{folders[0]}/{name}.png"
    figure.savefig(image, format="png", dpi=150)
    files, place = fsspec.core.url_to_fs(path)
    files.makedirs(place.rpartition("/")[0], exist_ok=True)
    with files.open(place, "wb") as file:
        file.write(image.getvalue())
    rank_zero_info(f"figure: {path}")
    for logger in trainer.loggers:
        # By what they can do: each of the two namespaces has its own classes.
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, global_step=trainer.global_step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[path], step=trainer.global_step)


def _folder_of(logger: Any) -> str:
    """Where a run's files are, as ModelCheckpoint has it; empty if it has none."""
    if logger.log_dir:
        return str(logger.log_dir)
    return "/".join(map(str, (logger.save_dir, logger.name, logger.version))) if logger.save_dir else ""
