"""What a recalibration costs over the forward that it needs anyway, beside two other tools.

Each tool is given an iterable that runs the bare train-mode forward of every batch on a copy of the network before it
hands the batch out: tool and bare forward take turns batch by batch, in one process.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from _networks import densenet121, efficientnet_b0, mlp500, resnet50, seeded
from _results import Results
from _rounds import Comparison, compare, now
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_bn.functional import recalibrate

warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
from fvcore.nn.precise_bn import update_bn_stats  # noqa: E402

Tool = Callable[[nn.Module, Iterable[Tensor]], object]
OURS, FVCORE, TORCH = "lightning_bn recalibrate", "fvcore update_bn_stats", "torch update_bn"
BATCHES = 8


@dataclass
class Turns:
    """Times of one tool and of the bare forwards between its batches."""

    tool: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    once: list[float] = field(default_factory=list)

    def run(self, tool: Tool, network: nn.Module, copy: nn.Module, batch: Tensor) -> None:
        """One call of the tool on some batches."""
        gc.collect()
        given = 0.0
        waited = 0.0
        started = now()

        def batches() -> Iterator[Tensor]:
            nonlocal given, waited
            for number in range(BATCHES):
                asked = now()
                if number:
                    self.tool.append(asked - given)
                with torch.no_grad():
                    copy(batch)
                self.bare.append(now() - asked)
                waited += now() - asked
                given = now()
                yield batch

        tool(network, batches())
        # The last batch is in what comes after it: not every tool asks for another one.
        self.bare.pop()
        self.once.append(now() - started - waited - BATCHES / (BATCHES - 1) * sum(self.tool[1 - BATCHES :]))

    def comparison(self) -> Comparison:
        """Of the tool with the bare forward."""
        return compare(self.tool, self.bare)


def measure(network: nn.Module, batch: Tensor, calls: int) -> dict[str, Turns]:
    """All tools in turn."""
    tools: dict[str, Tool] = {
        OURS: recalibrate,
        FVCORE: lambda model, batches: update_bn_stats(model, batches, num_iters=BATCHES),
        TORCH: lambda model, batches: update_bn(batches, model),
    }
    network.train()
    copy = deepcopy(network)
    with torch.no_grad():
        network(batch)
        copy(batch)
    turns = {name: Turns() for name in tools}
    for _ in range(calls):
        for name, tool in tools.items():
            turns[name].run(tool, network, copy, batch)
    return turns


def main() -> None:
    """Prints the ratios of all networks and writes them to `benchmarks/results/`."""
    torch.manual_seed(0)
    images, vectors = torch.randn(32, 3, 64, 64), torch.randn(32, 32)
    results = Results("recalibration", "What a recalibration costs over the bare train-mode forward of the same batches.")
    rows, overheads = [], []
    for title, build, batch, calls in (
        ("ResNet-50", resnet50, images, 5),
        ("DenseNet-121", densenet121, images, 5),
        ("EfficientNet-B0", efficientnet_b0, images, 10),
        ("MLP, 500 layers", mlp500, vectors, 40),
    ):
        extra = {}
        for name, turns in measure(seeded(build), batch, calls).items():
            found, once = turns.comparison(), min(turns.once)
            extra[name] = found.seconds - found.base
            rows.append(
                {
                    "network": title,
                    "tool": name,
                    "ms per batch": 1000 * found.seconds,
                    "ratio": found.ratio,
                    "median": found.median,
                    "10 to 90 %": found.spread,
                    "once, ms": 1000 * once,
                    "ratio of 200 batches": (once + 200 * found.seconds) / (200 * found.base),
                }
            )
        row = {"network": title, "ours, ms per batch": 1000 * extra[OURS], "fvcore, ms per batch": 1000 * extra[FVCORE]}
        overheads.append({**row, "share of fvcore's": extra[OURS] / extra[FVCORE]})
    results.table(
        "Time against the bare forward",
        rows,
        f"ratio: of the fastest batches, the tool's over those of the bare forwards between them; median and percentiles: "
        f"of neighbours. once: before the first and after the last of {BATCHES} batches. 32 images of 64x64, or 32 vectors.",
    )
    results.table("What is added to the forward, per batch", overheads)
    results.write()


if __name__ == "__main__":
    main()
