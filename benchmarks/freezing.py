"""What BatchNormFreezer costs in a training step, beside layers that were put into eval mode by hand.

Real Trainers that take turns of a few steps. By hand means: nobody puts the layers back into train mode, so that
setting them once is enough.
"""

import pytorch_lightning as pl
import torch
from _fits import fit_in_turns, timed, typical
from _launches import MEANING, title
from _networks import seeded
from _results import Results
from _rounds import Clock, asked_device, step_rows
from torch import nn

from lightning_bn import BatchNormFreezer
from lightning_bn.functional import FreezeSelection, FreezeSession, batch_norm_layers
from lightning_bn.functional.freezing.session import CHECK_EVERY

HOOKS = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
BASE = ".eval() by hand"
TURNS, STEPS = 40, 6


def network() -> nn.Module:
    """100 convolutions, each with a BatchNorm whose statistics are not those of construction."""

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        for _ in range(99):
            layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        built = nn.Sequential(*layers)
        built(torch.randn(8, 3, 10, 10))
        return built

    return seeded(build)


class ByHand(pl.Callback):
    """Sets eval mode once, after Lightning has set train mode.

    Args:
        without_gradient: Whether weight and bias are frozen too, as one does it by hand.
    """

    def __init__(self, without_gradient: bool = False) -> None:
        self._without_gradient = without_gradient

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for layer in batch_norm_layers(pl_module).values():
            layer.eval()
            layer.requires_grad_(not self._without_gradient)


def full_check(clock: Clock) -> float:
    """Microseconds of a comparison of all values of 100 frozen layers."""
    session = FreezeSession(network(), FreezeSelection())
    session.switch(True, 0)
    session.start_batch(0)
    spent = []
    for _ in range(100):
        started = clock.now()
        session.quick_check(thorough=True)
        spent.append((started, clock.now()))
    session.close(1)
    return 1e6 * min(clock.seconds(spent))


def main() -> None:
    """Prints the ratios and the time of each hook and writes them to `benchmarks/results/`."""
    device = asked_device()
    clock = Clock(device)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 10, 10, device=device)
    stats, everything = BatchNormFreezer(affine=False), BatchNormFreezer()
    hooks = {"statistics": timed(stats, HOOKS, clock), "statistics and affine": timed(everything, HOOKS, clock)}
    both, other, by_hand = "freezer, statistics and affine", "freezer, statistics", ".eval(), requires_grad_(False)"
    taken = fit_in_turns(
        {
            BASE: lambda: (network(), [ByHand()]),
            other: lambda: (network(), [stats]),
            both: lambda: (network(), [everything]),
            by_hand: lambda: (network(), [ByHand(without_gradient=True)]),
            "the same .eval() by hand again": lambda: (network(), [ByHand()]),
        },
        images,
        TURNS,
        STEPS,
    )
    results = Results(
        "freezing", "What BatchNormFreezer adds to a training step with 100 frozen BatchNorm layers.", device
    )
    results.table(
        "Time of a step in a real fit",
        step_rows(taken.seconds, BASE, "layers frozen by"),
        f"Against `{BASE}`, {TURNS} turns of {STEPS} steps. ratio: of the fastest steps; median and percentiles: of "
        "neighboring turns. The last row is the measurement's own error.",
    )
    step = 1e6 * min(taken.seconds[BASE])
    rows = []
    for frozen, calls in hooks.items():
        spent = {hook: typical(marks, clock) for hook, marks in calls.items()}
        for hook, value in {**spent, "together": sum(spent.values())}.items():
            rows.append({"frozen": frozen, "hook": hook, "us": value, "share of the step, %": 100 * value / step})
    results.table("Time of its hooks", rows, "us: microseconds, median of all steps.")
    once = full_check(clock)
    row = {"every": f"{CHECK_EVERY} batches", "us": once, "share of the steps, %": 100 * once / step / CHECK_EVERY}
    results.table(
        "Time of comparing all frozen values bit by bit",
        [row],
        "us: of one comparison, the fastest of many. share: spread over the steps in between.",
    )
    rows = [{"layers frozen by": name, **row} for name, row in taken.counts.items()]
    results.table(title(device, "step"), rows, MEANING[device.type])
    results.write()


if __name__ == "__main__":
    main()
