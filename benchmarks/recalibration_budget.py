"""Batches that `max_standard_error` takes, against the fewest that would have done.

The fewest, in hindsight, in two ways. As read: the first batch after which the standard error, estimated from the
batches so far, is below what was asked for, had it been looked at after every batch. As it is: by how far batches are
apart when all 1,500 are known.
"""

from collections.abc import Iterator
from itertools import islice
from math import ceil

import torch
from _networks import resnet50, seeded
from _results import Results
from torch import Tensor, nn

from lightning_bn.functional import batch_norm_layers, recalibrate
from lightning_bn.functional.recalibration.collector import collecting

ALL = 1500
ASKED = (0.1, 0.05, 0.02)


def small_network() -> nn.Module:
    """Six convolutions, 208 channels."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (48, 2), (64, 1)):
        layers += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def independent(size: int) -> Iterator[Tensor]:
    """Images that have their own brightness and contrast."""
    while True:
        yield (1 + 0.3 * torch.randn(size, 1, 1, 1)) * torch.randn(size, 3, 16, 16) + 0.5 * torch.randn(size, 1, 1, 1)


def by_scene(size: int) -> Iterator[Tensor]:
    """Batches whose images share a part of their brightness, as neighboring frames do."""
    for images in independent(size):
        yield images + 0.5 * torch.randn(1)


def heavy_tailed(size: int) -> Iterator[Tensor]:
    """One image in fifty is five times as strong."""
    for images in independent(size):
        yield images * torch.where(torch.rand(size, 1, 1, 1) < 0.02, 5, 1)


def readings(network: nn.Module, batches: list[Tensor]) -> list[float]:
    """The largest standard error of any channel, estimated after each of the batches."""
    found = []
    network.train()
    with collecting(batch_norm_layers(network)) as collector, torch.no_grad():
        for batch in batches:
            with collector.batch():
                network(batch)
            found.append(collector.parts[None].largest_standard_error())
    return found


def main() -> None:
    """Prints the counts of all settings and writes them to `benchmarks/results/`."""
    torch.set_num_threads(1)
    results = Results("recalibration_budget", "Batches used under max_standard_error against the fewest in hindsight.")
    rows = []
    for title, build, source, size, total in (
        ("6 layers, independent images", small_network, independent, 2, ALL),
        ("6 layers, independent images", small_network, independent, 8, ALL),
        ("6 layers, independent images", small_network, independent, 32, ALL),
        ("6 layers, images by scene", small_network, by_scene, 8, ALL),
        ("6 layers, heavy-tailed images", small_network, heavy_tailed, 8, ALL),
        ("ResNet-50, independent images", resnet50, independent, 8, 400),
    ):
        network = seeded(build)
        torch.manual_seed(1)
        batches = list(islice(source(size), total))
        read = readings(network, batches)
        layers = len(batch_norm_layers(network))
        for asked in ASKED:
            fewest = ceil(total * (read[-1] / asked) ** 2)
            if fewest > total:
                continue
            first = 1 + next(number for number, error in enumerate(read) if error <= asked)
            done = recalibrate(network, batches, max_standard_error=asked)
            rows.append(
                {
                    "network and data": title,
                    "layers": layers,
                    "batch size": size,
                    "asked for": asked,
                    "reached": done.standard_error,
                    "batches": done.num_batches,
                    "fewest, as read": first,
                    "ratio": done.num_batches / first,
                    "fewest, as it is": fewest,
                    "ratio ": done.num_batches / fewest,
                }
            )
    results.table(
        "Batches used",
        rows,
        "The error is that of the worst of all channels, reached: estimated from the batches used. At least 8 are "
        "always used: the spread of fewer says nothing, as the first readings show. Of 26,560 channels one always "
        "looks worse than it is as long as batches are few.",
    )
    results.write()


if __name__ == "__main__":
    main()
