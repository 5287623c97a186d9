"""One use of a BatchNorm layer in a forward, and one application of dropout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """One application of dropout while a forward ran.

    Attributes:
        module: The innermost module in whose forward it was applied.
        p: Its probability.
        kind: Name of the function that applied it.
    """

    module: str
    p: float
    kind: str


class Behind(NamedTuple):
    """What went into a tensor.

    Attributes:
        dropouts: What dropout was applied since the last normalization.
        directly: Those of them after which no weights came.
        after: Layers among those that are followed whose output went into it.
    """

    dropouts: frozenset[Dropout] = frozenset()
    directly: frozenset[Dropout] = frozenset()
    after: frozenset[str] = frozenset()

    def merged(self, other: Behind | None) -> Behind:
        """Return what went into either."""
        if other is None:
            return self
        return Behind(self.dropouts | other.dropouts, self.directly | other.directly, self.after | other.after)


@dataclass
class Origin:
    """A convolution or a linear layer with a bias, and how often its output was read.

    Attributes:
        module: Its name.
        reads: Functions that were given the output.
    """

    module: str
    reads: int = 0


@dataclass(frozen=True, eq=False)
class Use:
    """One forward of a BatchNorm layer.

    Attributes:
        position: How many uses of any layer came before it in the same forward.
        training: Whether it ran in train mode.
        updates: Whether it moved the running statistics.
        count: Values per channel in its input.
        mean: Of each channel of the input, ``(C,)``, in float64.
        var: Their biased variance.
        behind: What went into the input.
        origin: The layer with a bias that put out this input, if it was one.
    """

    position: int
    training: bool
    updates: bool
    count: int
    mean: Tensor
    var: Tensor
    behind: Behind = field(default_factory=Behind)
    origin: Origin | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Trace:
    """What a forward of one batch did.

    Attributes:
        uses: Of each BatchNorm layer that was reached, in order.
        dropouts: All that was applied, in order.
        single: The layer in train mode that was given one value per channel, where the forward ends with an error.
    """

    uses: dict[str, tuple[Use, ...]]
    dropouts: tuple[Dropout, ...] = ()
    single: str | None = None
