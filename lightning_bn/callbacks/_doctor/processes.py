"""Batches of several processes: normalized together where that helps, and only there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_bn.callbacks._doctor.examined_fit import ExaminedFit
from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.remedies import freeze_lines, lines

FEW_SAMPLES = 4
"""In the batch of one process, up to which normalizing together is worth what it costs."""


def not_synchronized(fit: ExaminedFit) -> Iterator[Finding]:
    """Find layers that normalize the few samples of each process on their own."""
    traces, examination = fit.examination.traces, fit.examination
    samples = None if traces is None else traces.samples[0]
    if samples is None or samples > FEW_SAMPLES or examination.processes == 1:
        return
    found = [name for name in examination.training_layers() if examination.processes_of(name) == 1]
    if found:
        together = samples * examination.processes
        yield Finding(
            "not-synchronized",
            "fault",
            examination.in_order(found),
            f"{counted(len(found), 'layer')} {'normalizes' if len(found) == 1 else 'normalize'} the "
            f"{counted(samples, 'sample')} of each of {examination.processes} processes on their own.",
            "Statistics of so few samples are noise in every activation, and evaluation uses the moving average of the "
            "first process alone.",
            lines(
                f"# normalizes {together} samples together:",
                "Trainer(sync_batchnorm=True)",
                "# or keep pre-trained statistics:",
                freeze_lines(examination, found),
            ),
            "trainer:\n  sync_batchnorm: true",
        )


def synchronized_alone(fit: ExaminedFit) -> Iterator[Finding]:
    """Find layers that are synchronized with nobody."""
    examination = fit.examination
    if examination.processes > 1:
        return
    layers = examination.layers
    found = [name for name in layers if examination.synchronized or isinstance(layers[name], nn.SyncBatchNorm)]
    if found:
        yield Finding(
            "synchronized-alone",
            "advice",
            examination.in_order(found),
            f"{counted(len(found), 'layer')} {'is' if len(found) == 1 else 'are'} synchronized in a fit of 1 process.",
            "With one process there is nothing to synchronize: it changes nothing here. A recipe for several GPUs that "
            "is run on one normalizes that much fewer samples.",
            lines(
                "Trainer(sync_batchnorm=False)",
                "# or on several GPUs:",
                "Trainer(sync_batchnorm=True, devices=-1, strategy='ddp')",
            ),
            "trainer:\n  sync_batchnorm: false",
        )
