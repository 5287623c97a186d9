"""What evaluation and frozen layers normalize with: statistics that were never trained, are missing or not finite."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.remedies import IN_CONSTRUCTION, lines
from lightning_bn.functional.layers.behavior import has_initial_statistics, nonfinite_channels
from lightning_bn.functional.layers.properties import has_running_statistics


def initial_statistics_frozen(examination: Examination) -> Iterator[Finding]:
    """Find frozen layers with the statistics of construction."""
    found = [name for name, layer in examination.frozen_layers().items() if has_initial_statistics(layer)]
    if found:
        yield Finding(
            "initial-statistics-frozen",
            "fault",
            examination.in_order(found),
            f"{counted(len(found), 'frozen layer')} {'has' if len(found) == 1 else 'have'} the running statistics of "
            f"construction, mean 0 and variance 1: no batch was ever seen.",
            "Frozen so, a layer normalizes nothing, in training as in evaluation: activations grow or vanish from "
            "layer to layer.",
            lines(
                "# load the pre-trained weights before freezing:",
                "model.load_state_dict(torch.load(path))",
                "# or take the statistics of the data, also before:",
                "recalibrate(model, loader)",
            ),
        )


def batch_statistics_in_eval(examination: Examination) -> Iterator[Finding]:
    """Find layers that were constructed without running statistics."""
    found = [name for name, layer in examination.layers.items() if not has_running_statistics(layer)]
    if found:
        layer = examination.layers[found[0]]
        yield Finding(
            "batch-statistics-in-eval",
            "fault",
            examination.in_order(found),
            f"{counted(len(found), 'layer')} {'has' if len(found) == 1 else 'have'} no running statistics: evaluation "
            f"too normalizes with the batch.",
            "The output for a sample depends on what else is in its batch, and on how many: metrics change with the "
            "batch size, and a batch of one sample may fail.",
            lines(IN_CONSTRUCTION, f"{type(layer).__name__}({layer.num_features}, track_running_stats=True)"),
        )


def statistics_not_finite(examination: Examination) -> Iterator[Finding]:
    """Find layers with statistics that are not finite."""
    bad = {name: nonfinite_channels(layer) for name, layer in examination.layers.items()}
    found = [name for name, channels in bad.items() if channels]
    if found:
        yield Finding(
            "statistics-not-finite",
            "fault",
            examination.in_order(found),
            f"running statistics of {counted(sum(bad.values()), 'channel')} in {counted(len(found), 'layer')} are not "
            f"finite.",
            "A moving average never recovers from an inf or a NaN: training goes on as if nothing were wrong, and "
            "every evaluation is NaN.",
            lines("# find the batch that had it; then statistics anew:", "recalibrate(model, loader)"),
        )
