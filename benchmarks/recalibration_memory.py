"""How much more memory a recalibration needs at its peak than the forward without gradients.

Counted from torch's allocator by its profiler. What grows with the batch would be an activation that is kept.
"""

import torch
from _memory import MIB, peak
from _networks import densenet121, efficientnet_b0, mlp500, resnet50, seeded
from _results import Results
from torch import Tensor, nn

from lightning_bn.functional import batch_norm_layers, recalibrate

BATCHES = 4


def forward(network: nn.Module, batch: Tensor) -> None:
    """The batches without gradients."""
    with torch.no_grad():
        for _ in range(BATCHES):
            network(batch)


def main() -> None:
    """Prints the peaks of all networks and writes them to `benchmarks/results/`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = Results(
        "recalibration_memory", "Peak memory of a recalibration over that of the forward without gradients."
    )
    rows = []
    for title, build in (
        ("ResNet-50", resnet50),
        ("DenseNet-121", densenet121),
        ("EfficientNet-B0", efficientnet_b0),
        ("MLP, 500 layers", mlp500),
    ):
        network = seeded(build).train()
        channels = sum(layer.num_features for layer in batch_norm_layers(network).values())
        for size in (4, 16):
            batch = torch.randn(size, 32) if build is mlp500 else torch.randn(size, 3, 64, 64)
            bare = peak(lambda network=network, batch=batch: forward(network, batch))
            ours = peak(lambda network=network, batch=batch: recalibrate(network, [batch] * BATCHES))
            rows.append(
                {
                    "network": title,
                    "channels": channels,
                    "batch size": size,
                    "forward, MiB": bare / MIB,
                    "recalibrate, MiB": ours / MIB,
                    "extra, MiB": (ours - bare) / MIB,
                    "extra, bytes per channel": (ours - bare) // channels,
                }
            )
    results.table("Peak memory beyond the network and the batch", rows)
    results.write()


if __name__ == "__main__":
    main()
