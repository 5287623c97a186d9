"""When to sample: every so many optimizer steps, however many of them a batch takes."""

from __future__ import annotations


class Cadence:
    """Which batches are judged, and after which of them a sample is taken.

    A batch may take no optimizer step (gradient accumulation), one, or several (several optimizers).

    Args:
        every_n_steps: Optimizer steps between two samples.
        step: Optimizer steps taken so far.
    """

    def __init__(self, every_n_steps: int, step: int) -> None:
        self._every = every_n_steps
        self._step = step
        self._per_batch = 1
        self._samples = step // every_n_steps
        self._sampled = False
        self._since_sample: int | None = None

    def judges(self) -> bool:
        """Whether the batch that comes is to be judged: the last one before a sample, and the first one after it.

        Two batches in a row: sources that take turns would otherwise always show the same one of them.
        """
        return self._sampled or (self._step + self._per_batch) // self._every > self._samples

    def samples(self, step: int) -> bool:
        """Whether a sample is due after a batch, at whose end ``step`` optimizer steps were taken."""
        if step > self._step:
            self._per_batch = step - self._step
        self._step = step
        self._sampled = step // self._every > self._samples
        self._samples = step // self._every
        if self._sampled:
            self._since_sample = 0
        elif self._since_sample is not None:
            self._since_sample += 1
        return self._sampled

    def judges_tasks(self, tasks: int) -> bool:
        """Whether the batch that comes is to be judged for the statistics of its task.

        Two of each task in a row come within twice as many batches as there are tasks, where these take turns.
        """
        return self.judges() or (self._since_sample is not None and self._since_sample < 2 * tasks)
