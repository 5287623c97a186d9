"""Whether layers that are frozen for a block hold, bit for bit, what they held when it began."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._text import counted
from lightning_bn.functional.freezing.baseline import Baseline
from lightning_bn.functional.freezing.change import Change
from lightning_bn.functional.freezing.report import Violation, in_words


class FreezeProof(tuple[str, ...]):
    """The names of the layers that a block freezes, and what became of their values.

    It can be asked inside the block and after it: after the backward, if that comes later. Once something trains the
    layers again it tells that they moved.

    Example:
        >>> import torch
        >>> from lightning_bn.functional import frozen_batch_norm
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> _ = layer(torch.randn(8, 2))
        >>> with frozen_batch_norm(layer) as proof:
        ...     _ = layer(torch.randn(8, 2))
        >>> print(proof)
        1 frozen layer bit-identical
    """

    _baseline: Baseline

    @classmethod
    def of(cls, layers: Mapping[str, _BatchNorm], *, stats: bool, affine: bool) -> FreezeProof:
        """Begin one: the values of now are those that are to stay."""
        proof = cls(layers)
        proof._baseline = Baseline(layers, stats=stats, affine=affine)
        return proof

    def changes(self) -> list[Change]:
        """Return which values differ in any bit from those at the beginning; empty if none does."""
        return self._baseline.changes()

    @property
    def identical(self) -> bool:
        """Whether every value is bit for bit what it was at the beginning."""
        return not self.changes()

    def __str__(self) -> str:
        changes, layers = self.changes(), counted(len(self), "frozen layer")
        moved = in_words([Violation(change, None) for change in changes])
        return f"{layers}; changed: {moved}" if changes else f"{layers} bit-identical"
