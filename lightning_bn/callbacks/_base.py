"""What all callbacks have in common: a name, arguments that are looked at, and what is refused when a run is set up."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning_bn.callbacks._lightning.callback_list import is_asked_by, same_kind_beside
from lightning_bn.callbacks._lightning.hyperparameters import log_hyperparameters
from lightning_bn.callbacks._lightning.namespaces import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_bn.callbacks._lightning.state import refuse_strategy
from lightning_bn.functional._checks import check_text
from lightning_bn.functional.layers.patterns import Patterns, SelectionError
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.statistics.channels import ChannelLayout


class BatchNormCallback(Callback):
    """A callback that may be used more than once in a Trainer, each time under a name of its own.

    Attributes:
        name: Tells it from others of its class; None for the only one.
    """

    name: str | None = None
    _selection: LayerSelection

    @property
    def state_key(self) -> str:
        """Under which its state lies in a checkpoint: its class and its name, whatever its settings."""
        key = f"{type(self).__name__}[{self.name}]" if self.name else type(self).__name__
        # Of two with one name Lightning says that their class cannot be used twice; setup says what is the matter.
        return f"{key} {id(self)}" if is_asked_by("_validate_callbacks_list") else key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_strategy(trainer, self)
        if any(other.state_key == self.state_key for other in same_kind_beside(trainer, self)):
            raise MisconfigurationException(
                f"two {type(self).__name__} callbacks have the name {self.name!r}: give each a different name=, which "
                "separates their states in checkpoints."
            )
        if stage == "fit":
            of = type(self).__name__ + (f"/{self.name}" if self.name else "")
            log_hyperparameters(trainer, of, self._settings_by_name())

    def _settings_by_name(self) -> dict[str, Any]:
        """The arguments of its class, not of one derived from it, as they are now."""
        kind = next(one for one in type(self).__mro__ if one.__module__.startswith("lightning_bn."))
        names = [name for name in inspect.signature(kind).parameters if hasattr(self, name)]
        return {name: getattr(self, name) for name in names}

    def _select(self, modules: Patterns, exclude: Patterns, root: str, name: str | None) -> None:
        """Take the arguments that all callbacks have.

        Raises:
            TypeError: If a pattern is no string.
            ValueError: If a pattern is empty or malformed, or ``root`` or ``name`` is no string.
        """
        check_text("name", name, none="for the only callback of its kind")
        self._selection = LayerSelection(modules, exclude, root)
        self.modules, self.exclude, self.root, self.name = modules, exclude, root, name

    def _layout(self, module: LightningModule) -> ChannelLayout:
        """Of the selected layers that keep running statistics."""
        return ChannelLayout.of(self._selection.tracked_layers(module))

    def _log_curves(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Give values to the loggers, at the step of now."""
        if not trainer.barebones:
            for logger in trainer.loggers:
                logger.log_metrics(dict(metrics), step=trainer.global_step)

    def _known_under_other_names(self, checkpoint: Mapping[str, Any]) -> list[str]:
        """State keys of its class in a checkpoint, if none of them is its own."""
        keys = [str(key) for key in checkpoint.get("callbacks", {}) if str(key).startswith(type(self).__name__)]
        return [] if self.state_key in keys else keys

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Arguments that the ground floor refuses inside are a misconfiguration of this callback.

        Raises:
            MisconfigurationException: In the place of a ValueError, with the callback's name before it.
        """
        try:
            yield
        except SelectionError:
            # An error of its own kind, here as on the ground floor.
            raise
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
