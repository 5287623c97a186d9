"""How many values a layer estimates a mean and a variance from."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.remedies import freeze_lines, freeze_yaml, lines

FEWEST_VALUES = 8
"""Per channel; below that the variance of a batch is off by more than half by chance."""


def few_values(examination: Examination) -> Iterator[Finding]:
    """Find layers that normalize with a handful of values per channel in training, or with those of one sample."""
    if examination.traces is None:
        return
    counts = {
        name: min(of_uses) * examination.processes_of(name)
        for name in examination.training_layers()
        # Without any value, as of a head that is given no box, nothing is normalized.
        if (of_uses := [use.count for uses in examination.uses(name) for use in uses if use.count])
    }
    for trace in examination.traces.batches:
        if trace.single is not None:
            counts[trace.single] = examination.processes_of(trace.single)
    found = [name for name, count in counts.items() if count < FEWEST_VALUES]
    if found:
        yield _of_few(examination, found, min(counts[name] for name in found))
    elif examination.processes == 1 and set(examination.traces.samples) == {1} and counts:
        yield _of_one_sample(examination, [*counts])


def _of_few(examination: Examination, found: list[str], least: int) -> Finding:
    error = (
        "" if least == 1 else f" Of {least} values, a variance is off by {math.sqrt(2 / (least - 1)):.0%} by chance."
    )
    single = " Of one value there is none: the forward raises an error." if least == 1 else ""
    return Finding(
        "few-values",
        "fault",
        examination.in_order(found),
        f"{_normalize(found)} with {counted(least, 'value')} per channel in training, at the batch size given.",
        f"The noise of the estimate is multiplied into every activation, and evaluation, without it, is another "
        f"function.{error}{single}",
        _larger(examination, found),
        lines(
            "# keeps pre-trained statistics; on several GPUs instead: sync_batchnorm: true",
            freeze_yaml(examination, found),
        ),
    )


def _of_one_sample(examination: Examination, found: list[str]) -> Finding:
    return Finding(
        "few-values",
        "advice",
        examination.in_order(found),
        f"{_normalize(found)} with one sample alone in training: there is 1 in a batch.",
        "Positions within a sample are alike: mean and variance are those of the sample, not of the data. Training "
        "takes out what it has as a whole, such as the brightness of an image; evaluation, with averages over many, "
        "does not.",
        _larger(examination, found),
        lines(
            "# keeps pre-trained statistics; on several GPUs instead: sync_batchnorm: true",
            freeze_yaml(examination, found),
        ),
    )


def _normalize(found: list[str]) -> str:
    return f"{counted(len(found), 'layer')} {'normalizes' if len(found) == 1 else 'normalize'}"


def _larger(examination: Examination, found: list[str]) -> str:
    return lines(
        "# a larger batch_size (accumulate_grad_batches does not help), or on several GPUs:",
        "Trainer(sync_batchnorm=True)",
        "# or keep pre-trained statistics:",
        freeze_lines(examination, found),
        "# or, for what is trained from scratch, torch.nn.GroupNorm",
    )
