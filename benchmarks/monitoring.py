"""What BatchNormMonitor costs in a training step of a ResNet-50, and where there are a thousand layers.

Real Trainers that take turns of a few steps; the monitor's curves go to a CSVLogger.
"""

from io import BytesIO, StringIO
from itertools import pairwise
from statistics import median

import pytorch_lightning as pl
import torch
from _fits import fit_in_turns, timed, typical
from _launches import MEANING, title
from _memory import MIB, peak
from _networks import resnet50, seeded
from _results import Results
from _rounds import Clock, asked_device, step_rows
from rich.console import Console
from torch import nn

from lightning_bn import BatchNormMonitor
from lightning_bn.functional import batch_norm_layers
from lightning_bn.functional.layers.behavior import describe_layers
from lightning_bn.functional.monitoring.session import MonitorSession
from lightning_bn.functional.statistics.snapshots import snapshot_of
from lightning_bn.plotting import drift_figure
from lightning_bn.report import drift_table

TURNS, STEPS = 20, 3
INTERVAL = BatchNormMonitor().every_n_steps
NEVER = 10**9
BASE = "no monitor"


def network() -> nn.Module:
    """In the middle of a training: nothing is held back because of initial values."""
    built = seeded(resnet50)
    for layer in built.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked.fill_(1000)
    return built


def at_scale(device: torch.device) -> dict[str, dict[str, object]]:
    """What a monitor costs where there are a thousand layers, and what it leaves after 100,000 steps; one row each."""
    clock = Clock(device)
    network = nn.Sequential(*(nn.BatchNorm1d(1000) for _ in range(1000))).to(device).train()
    layers = batch_norm_layers(network)
    for layer in layers.values():
        layer.num_batches_tracked.fill_(1000)
    batch, session = torch.randn(8, 1000, device=device), MonitorSession(layers)
    hooks, samples, forwards, copies = [], [], [], []
    for step in range(1, 4 * INTERVAL + 1):
        marks = [clock.now()]
        session.before_batch()
        marks.append(clock.now())
        with torch.no_grad():
            network(batch)
        marks.append(clock.now())
        if due := session.after_batch(batch, step):
            session.sample(step, right_after=True)
        marks.append(clock.now())
        snapshot_of(layers)
        marks.append(clock.now())
        before, forward, after, copy = clock.seconds(pairwise(marks))
        # The first sample makes constants.
        if step > INTERVAL:
            hooks.append(before + after)
            samples += [after] * due
            forwards.append(forward)
            copies.append(copy)
    per_step = sum(hooks) / len(hooks)
    cost = {
        "copy of the statistics, ms": 1000 * median(copies),
        "sample, ms": 1000 * median(samples),
        "ratio": median(samples) / median(copies),
        "all hooks, ms per step": 1000 * per_step,
        "bare forward, ms": 1000 * median(forwards),
        "share of it": per_step / median(forwards),
    }
    if device.type == "cpu":
        network(batch)
        session.after_batch(batch, 0)
        cost["peak of a sample, MiB"] = peak(lambda: session.sample(step + 1)) / MIB
    history, names = session.history, session.history.names
    for now in range(step + INTERVAL, 100_001, INTERVAL):
        history.append(now, now // 1000, names, now / 1e5 * torch.rand(len(names), dtype=torch.float64))
        if now % 1000 == 0:
            for name in names:
                history.mark(now, name, "recalibrated")
    sizes = {key: _saved(value) for key, value in session.state().state_dict().items()}
    text = StringIO()
    table = drift_table(
        describe_layers(layers), session.own.reference, snapshot_of(layers), history, [1.0] * len(names), "jeffreys"
    )
    Console(file=text, width=80).print(table)
    drawn = clock.now()
    drift_figure(history, "jeffreys").savefig(BytesIO())
    [seconds] = clock.seconds([(drawn, clock.now())])
    left = {
        "samples kept": len(history),
        "marks kept": len(history.marks),
        "in a checkpoint, MiB": sum(sizes.values()) / MIB,
        "of it the reference": sizes["reference"] / MIB,
        "of it the history": sizes["history"] / MIB,
        "lines of the table": len(text.getvalue().splitlines()),
        "figure, s": seconds,
    }
    return {"cost": cost, "left": left}


def _saved(value: object) -> int:
    """Bytes in a checkpoint."""
    file = BytesIO()
    torch.save(value, file)
    return file.tell()


def main() -> None:
    """Prints the ratios and the time of a sample and writes them to `benchmarks/results/`."""
    device = asked_device()
    clock = Clock(device)
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64, device=device)
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
        f"every {INTERVAL} steps, the default": (at_sample + (INTERVAL - 1) * between) / INTERVAL,
    }
    rows = [{"interval": name, "microseconds per step": us, "ratio": 1 + us / step} for name, us in costs.items()]
    results.table("Time of its hook over that of a step", rows, "Median of all calls over the fastest step.")
    results.table(
        title(device, "step"), [{"fit": name, **row} for name, row in taken.counts.items()], MEANING[device.type]
    )
    scale = at_scale(device)
    results.table(
        "1,000 layers, 1,000,000 channels",
        [scale["cost"]],
        f"Medians of {3 * INTERVAL} train-mode forwards of 8 samples, without gradients, a sample every {INTERVAL} of "
        "them. peak: what a sample allocates beside what the layers and the monitor hold.",
    )
    results.table(
        "The same after 100,000 steps",
        [scale["left"]],
        f"A sample every {INTERVAL} steps and a recalibration of all layers every 1,000. The table at 80 columns.",
    )
    results.write()


if __name__ == "__main__":
    main()
