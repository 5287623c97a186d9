"""Averaged weights, and statistics that belong to other weights."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_bn.callbacks._doctor.examined_fit import ExaminedFit
from lightning_bn.callbacks._lightning.averages import averaging_names
from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.remedies import callback_yaml, lines


def averaged_without_recalibration(fit: ExaminedFit) -> Iterator[Finding]:
    """Find layers whose weights are averaged without population statistics for the average."""
    names, layers = averaging_names(fit.trainer), fit.examination.tracking_layers()
    if names and layers and not fit.callbacks("PreciseBatchNorm"):
        yield Finding(
            "averaged-without-recalibration",
            "fault",
            tuple(layers),
            f"{names[0]} averages the weights before {counted(len(layers), 'layer')}, and nothing recalibrates the "
            f"running statistics for the average.",
            "Running statistics are those of the weights that trained, or an average of these: the averaged network "
            "gives other activations, and validates worse than it could.",
            lines(f"# beside {names[0]}, which stays:", "Trainer(callbacks=[PreciseBatchNorm()])"),
            callback_yaml("PreciseBatchNorm"),
        )
