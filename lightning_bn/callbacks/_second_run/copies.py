"""Copies of loaders and of what they hold, from which nothing of the originals is drawn."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException
from lightning_bn.callbacks._second_run.drawn_once import CHOICES
from lightning_bn.functional._object_copies import Copier


def copied(value: Any, leave: tuple[type, ...] = ()) -> Any:
    """Return a copy, as deep as it goes, of everything but modules and instances of ``leave``.

    Raises:
        MisconfigurationException: If there is an iterator in it that cannot be copied: it would be drawn from.
    """
    copier = Copier((), (*leave, nn.Module))
    copy = copier.copied(value)
    copier.release()
    drawn = [type(held).__name__ for held in copier.uncopied if hasattr(type(held), "__next__")]
    if drawn:
        raise MisconfigurationException(
            f"PreciseBatchNorm: the loaders hold a {drawn[0]}, which cannot be copied. {CHOICES}"
        )
    return copy
