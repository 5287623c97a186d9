"""What BatchNormMonitor costs in a training step of a ResNet-50.

Real Trainers that take turns of a few steps; the monitor's curves go to a CSVLogger.
"""

import pytorch_lightning as pl
import torch
from _fits import fit_in_turns, timed, typical
from _launches import MEANING, title
from _networks import resnet50, seeded
from _results import Results
from _rounds import Clock, asked_device, step_rows
from torch import nn

from lightning_bn import BatchNormMonitor

TURNS, STEPS = 20, 3
NEVER = 10**9
BASE = "no monitor"


def network() -> nn.Module:
    """In the middle of a training: nothing is held back because of initial values."""
    built = seeded(resnet50)
    for layer in built.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked.fill_(1000)
    return built


def main() -> None:
    """Prints the ratios and the time of a sample and writes them to `benchmarks/results/`."""
    device = asked_device()
    clock = Clock(device)
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64, device=device)
    interval = BatchNormMonitor().every_n_steps
    every, default = BatchNormMonitor(every_n_steps=1), BatchNormMonitor(every_n_steps=NEVER)
    hook = "on_train_batch_end"
    sample, no_sample = (timed(monitor, [hook], clock)[hook] for monitor in (every, default))

    def fit(*callbacks: pl.Callback) -> tuple[nn.Module, tuple[pl.Callback, ...]]:
        return network(), callbacks

    taken = fit_in_turns(
        {
            BASE: fit,
            "monitor, every step": lambda: fit(every),
            "monitor, between samples": lambda: fit(default),
            "no monitor again": fit,
        },
        images,
        TURNS,
        STEPS,
    )
    results = Results(
        "monitoring",
        "What BatchNormMonitor adds to a training step of a ResNet-50, 53 layers, 26,560 channels.",
        device,
    )
    results.table(
        "Time of a step in a real fit",
        step_rows(taken.seconds, BASE, "fit"),
        f"{TURNS} turns of {STEPS} steps with 16 images of 64x64. ratio: of the fastest steps; median and percentiles: "
        "of neighboring turns. The last row is the measurement's own error.",
    )
    step = 1e6 * min(taken.seconds[BASE])
    at_sample, between = typical(sample, clock), typical(no_sample, clock)
    costs = {
        "every step": at_sample,
        f"every {interval} steps, the default": (at_sample + (interval - 1) * between) / interval,
    }
    rows = [{"interval": name, "microseconds per step": us, "ratio": 1 + us / step} for name, us in costs.items()]
    results.table("Time of its hook over that of a step", rows, "Median of all calls over the fastest step.")
    results.table(
        title(device, "step"), [{"fit": name, **row} for name, row in taken.counts.items()], MEANING[device.type]
    )
    results.write()


if __name__ == "__main__":
    main()
