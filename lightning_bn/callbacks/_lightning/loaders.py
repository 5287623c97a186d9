"""The Trainer's training loaders, and loaders combined as it combines them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.utilities.combined_loader import CombinedLoader

from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException, Trainer


def train_loaders(trainer: Trainer) -> tuple[Any, str]:
    """The Trainer's own processed training loaders (with its distributed samplers) and how they are combined.

    Raises:
        MisconfigurationException: If there is no training loader.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        raise MisconfigurationException(
            "the Trainer has no training loader, so there are no batches to recalibrate from."
        )
    return combined.iterables, combined._mode


def all_have_lengths(loaders: Any) -> bool:
    """Whether every loader in a collection of them says how many batches it has."""
    flat = loaders.flattened if _is_combined(loaders) else CombinedLoader(loaders).flattened
    return all(_has_length(loader) for loader in flat)


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


def _is_combined(loaders: Any) -> bool:
    # By name: each of the two namespaces has a class of its own.
    return any(base.__name__ == "CombinedLoader" for base in type(loaders).__mro__)


@contextmanager
def combined(loaders: Any, mode: str) -> Iterator[Iterator[Any]]:
    """Batches of loaders combined as the Trainer combines them, or as they are; workers end with the context."""
    loader = loaders if _is_combined(loaders) else CombinedLoader(loaders, mode)  # type: ignore[arg-type]
    try:
        yield (batch for batch, _, _ in iter(loader))
    finally:
        loader.reset()
