"""What a diagnosis rests on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_bn.functional.monitoring.measure import LayerTable


@dataclass(frozen=True)
class Evidence:
    """What is known of L layers at one sample, on the host.

    Attributes:
        table: What was measured; updates are NaN where it is not known.
        names: Of the layers.
        frozen_by: Who froze a layer's statistics; empty if nobody.
        training: Whether a layer is in train mode, ``(L,)``.
        synchronized: Whether a layer normalizes the batches of several processes together, ``(L,)``.
        idle: Training batches since the last update, ``(L,)``.
        samples: In a training batch; None if that is not known.
        judged: How many batches bias, scatter and gap rest on.
        processes: That train together.
    """

    table: LayerTable
    names: tuple[str, ...]
    frozen_by: tuple[str, ...]
    training: Tensor
    synchronized: Tensor
    idle: Tensor
    samples: int | None
    judged: int
    processes: int
