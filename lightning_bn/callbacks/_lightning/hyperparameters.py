"""Settings of callbacks among the hyperparameters of a run's loggers."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from lightning_bn.callbacks._lightning.namespaces import Trainer, rank_zero_warn


def log_hyperparameters(trainer: Trainer, of: str, settings: Mapping[str, Any]) -> None:
    """Give settings to the loggers as hyperparameters, beside those of the module.

    A logger that refuses them is one warning.

    Args:
        trainer: Of the run, before it gives the module's own hyperparameters to the loggers.
        of: Whose settings; stands before the keys.
        settings: By name. What is not a plain value goes as text.
    """
    # Trainer(enable_autolog_hparams=) came with Lightning 2.6.
    if not (trainer.is_global_zero and getattr(trainer, "enable_autolog_hparams", True)):
        return
    # Some loggers refuse other characters.
    prefix = re.sub(r"[^\w\-. /]", "_", of)
    values = {
        f"{prefix}/{name}": value if value is None or isinstance(value, bool | int | float | str) else str(value)
        for name, value in settings.items()
    }
    for logger in trainer.loggers:
        try:
            own: Any = getattr(logger, "hparams", None)
            if isinstance(own, MutableMapping):
                # TensorBoard shows what is logged first and nothing else, so that the module's would not be seen. These
                # are written with them into hparams.yaml.
                own.update(values)
            else:
                logger.log_hyperparams(values)
        except Exception as error:
            rank_zero_warn(f"{of}: {type(logger).__name__} could not log its settings ({error})")
