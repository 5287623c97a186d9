"""When a freeze is on: a pure function of epoch and step, so that a resumed run is where the first one was."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_bn.functional._checks import check_whole


@dataclass(frozen=True)
class FreezeSchedule:
    """A span of training, from ``start_*`` on and before ``stop_*``; what is None does not limit it.

    Attributes:
        start_epoch: First epoch; a negative one counts from the end, ``-20`` means the last 20 epochs.
        stop_epoch: First epoch that is no longer in the span; a negative one counts from the end.
        start_step: First optimizer step.
        stop_step: First optimizer step that is no longer in the span.

    Raises:
        ValueError: If a bound is no whole number, a step is negative, or the span is empty as far as that can be told.

    Example:
        >>> last_two = FreezeSchedule(start_epoch=-2)
        >>> [last_two.is_on(epoch, step=0, max_epochs=5) for epoch in range(5)]
        [False, False, False, True, True]
    """

    start_epoch: int | None = None
    stop_epoch: int | None = None
    start_step: int | None = None
    stop_step: int | None = None

    def __post_init__(self) -> None:
        """Refuse what can never be on."""
        for name, value in vars(self).items():
            # Only epochs count from the end of training.
            check_whole(name, value, 0 if name.endswith("step") else None, none="for no limit")
        for unit in ("epoch", "step"):
            start, stop = getattr(self, f"start_{unit}"), getattr(self, f"stop_{unit}")
            if start is not None and stop is not None and (start < 0) == (stop < 0) and stop <= start:
                raise ValueError(
                    f"start_{unit}={start} with stop_{unit}={stop} freezes nothing: stop_{unit} must be larger than "
                    f"start_{unit}."
                )

    @property
    def counts_from_the_end(self) -> bool:
        """Whether it needs to know how many epochs there will be."""
        return any(epoch is not None and epoch < 0 for epoch in (self.start_epoch, self.stop_epoch))

    @property
    def always(self) -> bool:
        """Whether nothing limits it."""
        return self == FreezeSchedule()

    def is_on(self, epoch: int, step: int, max_epochs: int | None) -> bool:
        """Whether the batch that comes next lies in the span.

        Args:
            epoch: The running epoch, from 0.
            step: Optimizer steps taken so far.
            max_epochs: How many epochs there will be; None or -1 if that is not known.

        Raises:
            ValueError: If an epoch counts from the end of a training of unknown length.
        """
        if self.counts_from_the_end and (max_epochs is None or max_epochs < 0):
            raise ValueError(
                f"start_epoch={self.start_epoch}, stop_epoch={self.stop_epoch}: a negative epoch counts from the end, "
                f"but max_epochs={max_epochs} does not say how many there are: set max_epochs, or use start_step and "
                "stop_step."
            )

        def absolute(bound: int | None) -> int | None:
            return bound if bound is None or bound >= 0 else max(0, bound + (max_epochs or 0))

        return _within(epoch, absolute(self.start_epoch), absolute(self.stop_epoch)) and _within(
            step, self.start_step, self.stop_step
        )

    def never_on(self, max_epochs: int | None, max_steps: int) -> bool:
        """Whether no batch of the whole training can lie in the span, as far as its length is known.

        Args:
            max_epochs: How many epochs there will be; None or -1 if that is not known.
            max_steps: How many optimizer steps at most; -1 if that is not limited.
        """
        if self.start_step is not None and 0 <= max_steps <= self.start_step:
            return True
        if max_epochs is None or max_epochs < 0:
            return False
        step = self.start_step or 0
        return max_epochs > 0 and not any(self.is_on(epoch, step, max_epochs) for epoch in range(max_epochs))

    def __str__(self) -> str:
        bounds = (
            ("from epoch", self.start_epoch),
            ("before epoch", self.stop_epoch),
            ("from step", self.start_step),
            ("before step", self.stop_step),
        )
        return ", ".join(f"{word} {value:,}" for word, value in bounds if value is not None) or "always"


def _within(value: int, start: int | None, stop: int | None) -> bool:
    return (start is None or value >= start) and (stop is None or value < stop)
