"""What it takes to merge recalibrated statistics across processes: at once, layer by layer or buffer by buffer.

Local processes over gloo, one thread each, in which the ways take turns. They share the machine's cores and send
nothing over a network, so that a time says nothing about a cluster; how often they have to wait for each other does.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from _processes import on_processes
from _results import Results
from _rounds import compare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_bn.functional.distributed.agreement import agree, layer_facts
from lightning_bn.functional.recalibration.across_processes import across_processes
from lightning_bn.functional.recalibration.population import Population
from lightning_bn.functional.recalibration.run import Counts
from lightning_bn.functional.statistics.channels import ChannelLayout
from lightning_bn.functional.statistics.sample_moments import Moments, merge, variance

CHANNELS = 256
LAYERS = (50, 200, 1000)
#: How many layers the slow ways are timed with at most, by number of processes: a loop over layers takes minutes on few
#: cores, and the time of a part of it, multiplied, is that of the whole.
PROCESSES = {2: 1000, 4: 25, 8: 15}
#: Seconds after which no further round begins, for one number of layers; rounds at least and at most; not counted.
SECONDS, FEWEST, MOST, WARM_UP = 4, 3, 20, 1
#: How far apart the ways' statistics may be.
TOLERANCE = 1e-6

OURS, AGAIN = "lightning_bn", "ours again"
FUSED, PER_LAYER, PER_BUFFER = "three sums", "per layer", "per buffer"

#: Mean and unbiased variance by layer.
Statistics = Mapping[str, tuple[Tensor, Tensor]]
#: One sample by layer.
Local = Mapping[str, Moments]


def local(rank: int, layers: int) -> Local:
    """What a process has gathered of layers with 256 channels: another sample, and another size, on every process."""
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for index in range(layers):
        count = torch.tensor(1000.0 + 100 * rank + index, dtype=torch.float64)
        mean = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
        spread = 0.5 + torch.rand(CHANNELS, generator=generator, dtype=torch.float64)
        found[f"layers.{index}.norm"] = Moments(count, mean, count * spread)
    return found


def package(gathered: Local) -> Callable[[], Statistics]:
    """What `recalibrate(distributed=True)` does before and after its batches: all that is known of its code here."""
    layout = ChannelLayout(tuple(gathered), (CHANNELS,) * len(gathered))
    eps = (1e-5,) * len(gathered)
    parts_of = zip(*gathered.values(), strict=True)
    moments = Moments(*(torch.cat([part.expand(CHANNELS) for part in parts]) for parts in parts_of))
    errors = torch.ones(2, CHANNELS * len(gathered), dtype=torch.float64)
    population = Population(
        layout=layout,
        moments=moments,
        errors=errors,
        averages=torch.stack((moments.mean, variance(moments))),
        apart=torch.zeros_like(errors),
        eps=torch.full_like(moments.mean, 1e-5),
        uses=torch.ones(len(gathered)),
        nonfinite=torch.zeros(len(gathered)),
        empty=torch.zeros(len(gathered)),
    )
    totals, device = Counts(batches=1, samples=32), torch.device("cpu")

    def run() -> Statistics:
        agree({**layer_facts(layout), "estimator": "pooled"}, device)
        layers = {None: (layout, eps)}
        merged = across_processes({None: population}, layers, {None: totals}, device)[0][None]
        return {name: (mean, var) for name, (mean, var) in layout.split(merged.statistics("pooled")).items()}

    return run


def per_buffer(gathered: Local) -> Statistics:
    """As written by hand: three all_reduces for each layer."""
    found = {}
    for name, sample in gathered.items():
        sums = three_sums(sample)
        for values in sums:
            dist.all_reduce(values)
        found[name] = finished(*sums)
    return found


def per_layer(gathered: Local) -> Statistics:
    """The same with the three sums of a layer one after another in one tensor."""
    found = {}
    for name, sample in gathered.items():
        flat = torch.cat(three_sums(sample))
        dist.all_reduce(flat)
        found[name] = finished(*flat.split((1, CHANNELS, CHANNELS)))
    return found


def fused(gathered: Local) -> Statistics:
    """The same with those of all layers in one tensor: the fewest bytes and collectives that give the statistics."""
    flat = torch.cat([values for sample in gathered.values() for values in three_sums(sample)])
    dist.all_reduce(flat)
    parts = flat.view(len(gathered), -1)
    return {name: finished(*part.split((1, CHANNELS, CHANNELS))) for name, part in zip(gathered, parts, strict=True)}


def three_sums(sample: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares: what can be added up."""
    count, mean, m2 = sample
    return count.reshape(1).clone(), count * mean, m2 + count * mean.square()


def finished(count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance."""
    mean = total / count
    return mean, (squares - count * mean.square()) / (count - 1)


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within, through whichever function of torch.

    Attributes:
        calls: How many.
        bytes: Of the tensors that this process put in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # Where there are outputs they are the arguments before the inputs.
            given = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args]
            self.calls += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in [t for t in given if t][-1])
        return func(*args, **(kwargs or {}))


def difference(found: Statistics, truth: Local) -> float:
    """The largest difference of any mean, in means or standard deviations, and of any variance, relative."""
    if list(found) != list(truth):
        return math.inf
    largest = 0.0
    for name, sample in truth.items():
        mean, var = found[name]
        expected = variance(sample)
        scale = torch.maximum(sample.mean.abs(), expected.sqrt())
        apart = torch.cat(((mean - sample.mean).abs() / scale, (var / expected - 1).abs()))
        largest = max(largest, float(apart.nan_to_num(nan=math.inf).max()))
    return largest


def take_turns(ways: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each round of each way: those of the process for which it took longest."""
    rounds = []
    end = time.monotonic() + SECONDS
    more = torch.tensor(True)
    while more:
        rounds.append([])
        for run in ways.values():
            dist.barrier()
            started = time.perf_counter()
            run()
            rounds[-1].append(time.perf_counter() - started)
        counted = len(rounds) - WARM_UP
        more = torch.tensor(counted < FEWEST or (counted < MOST and time.monotonic() < end))
        dist.broadcast(more, 0)
    seconds = torch.tensor(rounds[WARM_UP:], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return dict(zip(ways, seconds.T.tolist(), strict=True))


def measure(rank: int, processes: int, layers: int) -> dict[str, dict[str, Any]]:
    """Times, collectives and bytes of each way, and how far its statistics are from those of samples merged one by one.

    Raises:
        RuntimeError: If a way's statistics are wrong.
    """
    mine, truth = local(rank, layers), dict(local(0, layers))
    for other in range(1, processes):
        truth = {name: merge(truth[name], sample) for name, sample in local(other, layers).items()}
    part = dict(islice(mine.items(), PROCESSES[processes]))
    ours = package(mine)
    ways: dict[str, Callable[[], Statistics]] = {
        OURS: ours,
        FUSED: partial(fused, mine),
        PER_LAYER: partial(per_layer, part),
        PER_BUFFER: partial(per_buffer, part),
        AGAIN: ours,
    }
    found = {}
    for name, run in ways.items():
        done = part if name in (PER_LAYER, PER_BUFFER) else mine
        with Collectives() as counted:
            statistics = run()
        apart = difference(statistics, {layer: truth[layer] for layer in done})
        if not apart <= TOLERANCE:
            raise RuntimeError(f"{name}: statistics of {layers} layers on {processes} processes are off by {apart:.1e}")
        found[name] = {
            "collectives": counted.calls,
            "bytes": counted.bytes,
            "apart": apart,
            "share": len(done) / layers,
        }
    for name, seconds in take_turns(ways).items():
        found[name]["seconds"] = [taken / found[name]["share"] for taken in seconds]
    return found


def measure_all(rank: int, processes: int) -> list[dict[str, dict[str, Any]]]:
    """The same for each number of layers."""
    return [measure(rank, processes, layers) for layers in LAYERS]


def main() -> None:
    """Prints counts, bytes and ratios and writes them to `benchmarks/results/`."""
    results = Results(
        "collectives",
        f"Merging the statistics of BatchNorm layers with {CHANNELS} channels each across local processes (gloo).",
    )
    found = {
        (processes, layers): ways
        for processes in PROCESSES
        for layers, ways in zip(LAYERS, on_processes(measure_all, processes), strict=True)
    }
    whole = min(PROCESSES)
    results.table(
        "What is sent",
        [
            {"layers": layers, "way": name, "collectives": way["collectives"], "KiB per process": way["bytes"] / 2**10}
            for layers in LAYERS
            for name, way in found[whole, layers].items()
            if name != AGAIN
        ],
        "The same for any number of processes. KiB: of the tensors that a process puts in. lightning_bn: a collective "
        "to agree on the layers and one for ten sums per channel, of which seven are for standard errors, the other "
        "estimator and uses that lie apart; SyncBatchNorm layers take one more before every batch. The others, by "
        "hand: count, sum and sum of squares, in float64 too; three sums: of all layers in one all_reduce.",
    )
    rows = []
    for (processes, layers), ways in found.items():
        base = ways[OURS]["seconds"]
        row: dict[str, Any] = {
            "processes": processes,
            "layers": layers,
            "rounds": len(base),
            "ours, ms": 1000 * min(base),
        }
        for name in (PER_BUFFER, PER_LAYER, FUSED, AGAIN):
            compared = compare(ways[name]["seconds"], base)
            row |= {f"{name}, fastest": compared.ratio, f"{name}, median": compared.median}
        rows.append(row)
    apart = max(way["apart"] for ways in found.values() for way in ways.values())
    parts = " and ".join(f"{part} on {processes}" for processes, part in PROCESSES.items() if part < max(LAYERS))
    results.table(
        f"Time, as a multiple of that of {OURS}",
        rows,
        "Ratios: of the fastest rounds, and the median of neighboring rounds. A round takes as long as it does for "
        f"the slowest process, waiting included. {os.cpu_count()} CPUs for up to {max(PROCESSES)} processes, each with "
        "threads of gloo beside its own: absolute times mean nothing; ratios do, but they too differ from run to run. "
        f"Those of per buffer and per layer are of all layers on {whole} processes; for more than {parts} processes "
        "they are of so many layers, multiplied. ours again: the measurement's own error. All statistics "
        f"were the same to within {apart:.0e}, checked against samples merged one by one.",
    )
    results.write()


if __name__ == "__main__":
    main()
