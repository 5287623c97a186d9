"""Which modules train: seen in training, when it can be told, and given back for a run before validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_bn.functional.recalibration.isolation import preserved_modes


class TrainingModes:
    """The modes of a module's submodules in the last training batch.

    At validation everything is in eval: which layers train, and which containers branch on it, is known only before.
    Modules are held only for the duration of a fit.
    """

    def __init__(self) -> None:
        self._modes: list[tuple[nn.Module, bool]] = []
        self._tree_is_old = True

    def expect_changes(self) -> None:
        """Look at the tree of modules anew when modes are next seen: layers may be replaced."""
        self._tree_is_old = True

    def see(self, module: nn.Module) -> None:
        """Keep the modes of now."""
        modules = module.modules() if self._tree_is_old else [submodule for submodule, _ in self._modes]
        self._modes = [(submodule, submodule.training) for submodule in modules]
        self._tree_is_old = False

    def forget(self) -> None:
        """Keep nothing any more."""
        self._modes, self._tree_is_old = [], True

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Give modules the modes that were seen; at the end those that they had."""
        with preserved_modes(module.modules()):
            for submodule, training in self._modes:
                submodule.training = training
            yield
