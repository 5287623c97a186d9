"""What a recalibration costs over the forward that it needs anyway, beside two other tools.

Every rival runs the same batches through the same network in train mode, without gradients. One process, one thread.
"""

import warnings
from collections.abc import Callable

import torch
from _networks import densenet121, efficientnet_b0, mlp500, resnet50, seeded
from _results import Results
from _rounds import compare, take_turns
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_bn.functional import recalibrate

warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
from fvcore.nn.precise_bn import update_bn_stats  # noqa: E402

FORWARD = "forward only"
OURS = "lightning_bn.functional.recalibrate"
FVCORE = "fvcore update_bn_stats"
TORCH = "torch.optim.swa_utils.update_bn"


def forward_only(network: nn.Module, batches: list[Tensor]) -> None:
    """What every rival has to do."""
    with torch.no_grad():
        for batch in batches:
            network(batch)


def seconds(network: nn.Module, batches: list[Tensor], rounds: int) -> dict[str, list[float]]:
    """Of each rival in each round."""
    network.train()
    rivals: dict[str, Callable[[], object]] = {
        FORWARD: lambda: forward_only(network, batches),
        OURS: lambda: recalibrate(network, batches),
        FVCORE: lambda: update_bn_stats(network, batches, num_iters=len(batches)),
        TORCH: lambda: update_bn(batches, network),
    }
    return take_turns(rivals, rounds)


def main() -> None:
    """Prints the ratios of all networks and writes them to `benchmarks/results/`."""
    torch.manual_seed(0)
    images = [torch.randn(32, 3, 64, 64) for _ in range(8)]
    vectors = [torch.randn(32, 32) for _ in range(32)]
    results = Results("recalibration", "What a recalibration costs over the bare train-mode forward of the same batches.")
    rows, overheads = [], []
    for title, build, batches, rounds in (
        ("ResNet-50", resnet50, images, 12),
        ("DenseNet-121", densenet121, images, 12),
        ("EfficientNet-B0", efficientnet_b0, images, 16),
        ("MLP, 500 layers", mlp500, vectors, 20),
    ):
        times = seconds(seeded(build), batches, rounds)
        found = {name: compare(taken, times[FORWARD]) for name, taken in times.items()}
        for name, one in found.items():
            row = {"network": title, "rival": name, "ms per batch": 1000 * one.seconds / len(batches)}
            rows.append({**row, "ratio": one.ratio, "10 to 90 % of rounds": one.spread})
        bare = found[FORWARD].seconds
        ours, theirs = ((found[name].seconds - bare) / len(batches) * 1000 for name in (OURS, FVCORE))
        row = {"network": title, "recalibrate, ms per batch": ours, "fvcore, ms per batch": theirs}
        overheads.append({**row, "share of fvcore's": ours / theirs})
    results.table(
        "Time against the forward alone",
        rows,
        "Ratio of the fastest rounds; 8 batches of 32 images of 64x64 (the MLP: 32 batches of 32 vectors) a round. What "
        "a recalibration costs once, before and after the batches, is in it.",
    )
    results.table("Overhead beside fvcore's", overheads, "Fastest round less the fastest of the forward alone.")
    results.write()


if __name__ == "__main__":
    main()
