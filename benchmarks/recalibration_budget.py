"""Batches that `max_standard_error` takes, against the fewest that would have done.

In hindsight all 1,500 batches are known, and with them how far batches are apart: the fewest are those whose standard
error, by that spread, is below what was asked for. While it runs, a recalibration has to judge by the batches so far.
"""

from collections.abc import Iterator
from itertools import islice
from math import ceil

import torch
from _networks import resnet50, seeded
from _results import Results
from torch import Tensor, nn

from lightning_bn.functional import batch_norm_layers, recalibrate

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
    """Batches whose images share a part of their brightness, as neighbouring frames do."""
    for images in independent(size):
        yield images + 0.5 * torch.randn(1)


def heavy_tailed(size: int) -> Iterator[Tensor]:
    """One image in fifty is five times as strong."""
    for images in independent(size):
        yield images * torch.where(torch.rand(size, 1, 1, 1) < 0.02, 5, 1)


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
        known = recalibrate(network, batches).standard_error
        layers = len(batch_norm_layers(network))
        for asked in ASKED:
            fewest = max(1, ceil(total * (known / asked) ** 2))
            if fewest > total:
                continue
            done = recalibrate(network, batches, max_standard_error=asked)
            rows.append(
                {
                    "network and data": title,
                    "layers": layers,
                    "batch size": size,
                    "asked for": asked,
                    "reached": done.standard_error,
                    "batches": done.num_batches,
                    "fewest": fewest,
                    "ratio": done.num_batches / fewest,
                    "used of fewest or 8": done.num_batches / max(8, fewest),
                }
            )
    results.table(
        "Batches used",
        rows,
        "reached: by the batches used. At least 8 are always used, since the spread of fewer says nothing; the last column "
        "leaves that out. The error asked for is that of the worst of all channels.",
    )
    results.write()


if __name__ == "__main__":
    main()
