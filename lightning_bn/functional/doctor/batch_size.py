"""How many values a layer estimates a mean and a variance from."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding

FEWEST_VALUES = 8
"""Per channel; below that the variance of a batch is off by more than half by chance."""


def few_values(examination: Examination) -> Iterator[Finding]:
    """Find layers that normalize with a handful of values per channel in training."""
    if examination.traces is None:
        return
    counts = {
        name: min(use.count for uses in of_batches for use in uses) * examination.processes_of(name)
        for name in examination.training_layers()
        if (of_batches := examination.uses(name))
    }
    for trace in examination.traces.batches:
        if trace.single is not None:
            counts[trace.single] = examination.processes_of(trace.single)
    found = [name for name, count in counts.items() if count < FEWEST_VALUES]
    if not found:
        return
    least = min(counts[name] for name in found)
    error = (
        "" if least == 1 else f" Of {least} values, a variance is off by {math.sqrt(2 / (least - 1)):.0%} by chance."
    )
    single = " Of one value there is none: the forward raises an error." if least == 1 else ""
    yield Finding(
        "few-values",
        "fault",
        examination.in_order(found),
        f"{counted(len(found), 'layer')} {'normalizes' if len(found) == 1 else 'normalize'} with {least} "
        f"value{'s' * (least != 1)} per channel in training, at the batch size given.",
        f"The noise of the estimate is multiplied into every activation, and evaluation, without it, is another "
        f"function.{error}{single}",
        f"a larger batch_size, Trainer(sync_batchnorm=True) on several GPUs, or keep pre-trained statistics: "
        f"BatchNormFreezer({examination.paths(found)})",
    )
