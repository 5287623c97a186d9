"""What a recalibration costs over the forward that it needs anyway, beside two other tools.

Each tool is given an iterable that runs the bare train-mode forward of every batch on a copy of the network before it
hands the batch out: tool and bare forward take turns batch by batch, in one process.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median

import torch
from _launches import MEANING, counting, title
from _networks import densenet121, efficientnet_b0, mlp500, resnet50, seeded
from _results import Results
from _rounds import Clock, asked_device, compare
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_bn.functional import batch_norm_layers, recalibrate

warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
from fvcore.nn.precise_bn import update_bn_stats  # noqa: E402

#: Given the network, the batches and how many they are.
Tool = Callable[[nn.Module, Iterable[Tensor], int], object]
OURS, FVCORE, TORCH = "lightning_bn recalibrate", "fvcore update_bn_stats", "torch update_bn"
TOOLS: dict[str, Tool] = {
    OURS: lambda model, batches, number: recalibrate(model, batches),
    FVCORE: lambda model, batches, number: update_bn_stats(model, batches, num_iters=number),
    TORCH: lambda model, batches, number: update_bn(batches, model),
}
BATCHES = 8
SHORT_CALLS = 20


@dataclass
class Turns:
    """Times of one tool and of the bare forwards between its batches.

    Attributes:
        clock: Of the device.
        tool: From being handed a batch to asking for the next one.
        bare: Of the forward just before.
        rest: What the tool did before the first batch and from the last one on, that batch's forward included.
    """

    clock: Clock
    tool: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)

    def run(self, tool: Tool, network: nn.Module, copy: nn.Module, batch: Tensor) -> None:
        """One call of the tool on some batches."""
        gc.collect()
        now, asked, given = self.clock.now, [], []

        def batches() -> Iterator[Tensor]:
            for _ in range(BATCHES):
                asked.append(now())
                with torch.no_grad():
                    copy(batch)
                given.append(now())
                yield batch

        started = now()
        tool(network, batches(), BATCHES)
        ended = now()
        # Not every tool asks for another one after the last, so that its end is not seen.
        self.tool += self.clock.seconds(zip(given[:-1], asked[1:], strict=True))
        self.bare += self.clock.seconds(zip(asked[:-1], given[:-1], strict=True))
        self.rest.append(sum(self.clock.seconds([(started, asked[0]), (given[-1], ended)])))

    @property
    def added(self) -> float:
        """Seconds that a batch costs more than its bare forward, the median of neighbors."""
        return median(mine - bare for mine, bare in zip(self.tool, self.bare, strict=True))

    @property
    def once(self) -> float:
        """Seconds that a call costs beside its batches."""
        return median(self.rest) - median(self.tool)


def measure(network: nn.Module, batch: Tensor, calls: int) -> dict[str, Turns]:
    """All tools in turn."""
    clock = Clock(batch.device)
    network.train()
    copy = deepcopy(network)
    with torch.no_grad():
        network(batch)
        copy(batch)
    turns = {name: Turns(clock) for name in TOOLS}
    for number in range(clock.warm_up + calls):
        for name, tool in TOOLS.items():
            (turns[name] if number >= clock.warm_up else Turns(clock)).run(tool, network, copy, batch)
    return turns


def short_pass(network: nn.Module, batch: Tensor, number: int) -> dict[str, object]:
    """What a call for few batches costs beside their forwards, by calls and bare forwards in turn."""
    clock, layers = Clock(batch.device), len(batch_norm_layers(network))
    network.train()
    copy = deepcopy(network)
    marks: dict[Tool, list[tuple[object, object]]] = {TOOLS[OURS]: [], bare: []}
    for turn in range(clock.warm_up + 1 + SHORT_CALLS):
        for tool, model in ((bare, copy), (TOOLS[OURS], network)):
            gc.collect()
            started = clock.now()
            tool(model, [batch] * number, number)
            # The first turn fills caches.
            marks[tool] += [(started, clock.now())] * (turn > clock.warm_up)
    calls, forwards = (clock.seconds(marks[tool]) for tool in (TOOLS[OURS], bare))
    differences = [call - forward for call, forward in zip(calls, forwards, strict=True)]
    return {
        "batches": number,
        "call, ms": 1000 * min(calls),
        "forwards, ms": 1000 * min(forwards),
        "beside them, ms per layer": 1000 * (min(calls) - min(forwards)) / layers,
        "median": 1000 * median(differences) / layers,
    }


def bare(model: nn.Module, batches: Iterable[Tensor], number: int) -> None:
    """Forwards alone."""
    with torch.no_grad():
        for batch in batches:
            model(batch)


def counts(tool: Tool, network: nn.Module, batch: Tensor) -> dict[str, int]:
    """Operators or launches of a tool, per batch and once a call."""
    network.train()
    calls = []
    for number in (2, 3):
        with counting(batch.device) as found:
            tool(network, [batch] * number, number)
        calls.append(found)
    two, three = calls
    once = {f"{column}, once": 3 * two[column] - 2 * three[column] for column in two}
    return {column: three[column] - two[column] for column in two} | once


def main() -> None:
    """Prints the ratios of all networks and writes them to `benchmarks/results/`."""
    device = asked_device()
    torch.manual_seed(0)
    images, vectors = torch.randn(32, 3, 64, 64, device=device), torch.randn(32, 32, device=device)
    results = Results(
        "recalibration", "What a recalibration costs over the bare train-mode forward of the same batches.", device
    )
    networks = (
        ("ResNet-50", resnet50, images, images[:2, :, :32, :32], 5),
        ("DenseNet-121", densenet121, images, images[:2, :, :32, :32], 5),
        ("EfficientNet-B0", efficientnet_b0, images, images[:2, :, :32, :32], 10),
        ("MLP, 500 layers", mlp500, vectors, vectors, 30),
    )
    rows, overheads = [], []
    for architecture, build, batch, tiny, calls in networks:
        # What is done once does not depend on the batch: beside a small one it is seen better.
        added, once = {}, {name: turns.once for name, turns in measure(seeded(build).to(device), tiny, 8).items()}
        for name, turns in measure(seeded(build).to(device), batch, calls).items():
            found = compare(turns.tool, turns.bare)
            added[name] = turns.added
            rows.append(
                {
                    "network": architecture,
                    "tool": name,
                    "ms per batch": 1000 * found.seconds,
                    "ratio": found.ratio,
                    "median": found.median,
                    "10 to 90 %": found.spread,
                    "once, ms": 1000 * once[name],
                    "200 batches": found.median + once[name] / (200 * found.base),
                }
            )
        if build is mlp500:
            # Where there is next to nothing else; elsewhere it is lost in the measurement's error.
            ours, theirs = added[OURS], added[FVCORE]
            row = {"network": architecture, "ours, ms per batch": 1000 * ours, "fvcore, ms per batch": 1000 * theirs}
            overheads.append({**row, "share of fvcore's": ours / theirs})
    results.table(
        "Time against the bare forward",
        rows,
        "ratio: of the fastest batch of the tool and of the bare forwards between its batches; median and percentiles: "
        "of neighbors. torch's tool adds next to nothing: what it reads is the measurement's own error. once: what a "
        "call costs beside its batches. 200 batches: median and once together. 32 images of 64x64, or 32 vectors, a "
        "batch.",
    )
    results.table("What is added to a batch's forward", overheads, "Median of the differences of neighbors.")
    rows = [
        {"network": architecture, **short_pass(seeded(build).to(device), tiny, number)}
        for architecture, build, _, tiny, _ in networks
        for number in (1, 2)
    ]
    results.table(
        "Passes of few batches",
        rows,
        "The fastest call less the fastest of the same bare forwards, over the number of layers; median: of neighbors. "
        "It holds the copies of all weights and buffers and their comparison, which grow with their size. 2 images of "
        "32x32, or 32 vectors, a batch.",
    )
    # Last, since the profiler may leave the process slower.
    rows = [
        {"network": architecture, "tool": name, **counts(tool, seeded(build).to(device), batch)}
        for architecture, build, batch, _, _ in networks
        for name, tool in {"bare forward": bare, **TOOLS}.items()
    ]
    results.table(title(device, "batch"), rows, f"{MEANING[device.type]} once: what a call has beside its batches.")
    results.write()


if __name__ == "__main__":
    main()
