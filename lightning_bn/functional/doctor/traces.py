"""What forwards did: uses of BatchNorm layers, and dropout before them."""

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
        independent: As how many independent channels the channels vary from sample to sample.
        behind: What went into the input.
        origin: The layer with a bias that put out this input, if it was one.
    """

    position: int
    training: bool
    updates: bool
    count: int
    mean: Tensor
    var: Tensor
    independent: float
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


@dataclass(frozen=True)
class Traces:
    """What forwards of some batches did, all with the same weights.

    Attributes:
        batches: Of each batch, in train mode.
        again: Of the first batch in train mode, with other random numbers; empty where one forward tells.
        without_dropout: As ``again``, where dropout does nothing.
        in_eval: Of the first batch in eval mode; None where that is of no interest or fails.
        eval_error: What that forward raised; empty if nothing.
        samples: In each batch; None where they cannot be counted.
        tasks: Names of the parts of a batch that consists of several batches.
        drawn: What further forwards of the first batch in train mode reached, as long as evaluation reached more.
    """

    batches: tuple[Trace, ...]
    again: tuple[Trace, ...] = ()
    without_dropout: tuple[Trace, ...] = ()
    in_eval: Trace | None = None
    samples: tuple[int | None, ...] = ()
    tasks: tuple[str, ...] = ()
    eval_error: str = ""
    drawn: tuple[frozenset[str], ...] = ()

    @property
    def reached(self) -> set[str]:
        """The layers that any forward in train mode reached."""
        return {name for trace in (*self.batches, *self.again) for name in trace.uses}.union(*self.drawn)

    @property
    def skips_at_random(self) -> bool:
        """Whether forwards of the same batch reached different layers."""
        of_first = [*(frozenset(trace.uses) for trace in (self.batches[0], *self.again)), *self.drawn]
        return len({*of_first}) > 1

    @property
    def dropouts(self) -> list[Dropout]:
        """What dropout was applied in any forward, each once, in order."""
        return list(dict.fromkeys(dropout for trace in self.batches for dropout in trace.dropouts))
