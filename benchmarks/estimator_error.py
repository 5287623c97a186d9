"""The statistics' error against the number of samples, for the two estimators.

Synthetic images with a brightness of their own, so that the population's statistics are known: those of a very large
sample through the same convolution, in float64. `estimator_bias.py` shows by batch size what is left with all samples.
"""

import torch
from _results import Results
from torch import Tensor, nn

from lightning_bn.functional import recalibrate
from lightning_bn.functional.recalibration.precise_bn import Estimator
from lightning_bn.functional.statistics.sample_moments import Moments, merge, moments, variance

SAMPLES = (32, 128, 512, 2048, 8192)
DRAWS = 20
ESTIMATORS: tuple[Estimator, ...] = ("pooled", "mean_of_batches")


def images(count: int) -> Tensor:
    """Noise, and for each image a brightness of its own."""
    return torch.randn(count, 3, 8, 8) + torch.randn(count, 1, 1, 1)


def population(convolution: nn.Module, batches: int = 200) -> Moments:
    """Of 400,000 images."""
    found = None
    with torch.no_grad():
        for _ in range(batches):
            here = moments(convolution(images(2000)))
            found = here if found is None else merge(found, here)
    assert found is not None
    return found


def main() -> None:
    """Prints the errors and writes them to `benchmarks/results/`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16))
    truth = population(network[0])
    variances = variance(truth, unbiased=False)
    results = Results("estimator_error", "Error of recalibrated statistics against the number of samples.")
    rows = []
    for size in (4, 32):
        for count in SAMPLES:
            errors: dict[tuple[str, str], list[Tensor]] = {}
            for _ in range(DRAWS):
                batches = images(count).split(size)
                for estimator in ESTIMATORS:
                    recalibrate(network, batches, estimator=estimator)
                    mean, var = network[1].running_mean.double(), network[1].running_var.double()
                    errors.setdefault((estimator, "mean"), []).append((mean - truth.mean) / variances.sqrt())
                    errors.setdefault((estimator, "variance"), []).append(var / variances - 1)
            row: dict[str, object] = {"batch size": size, "samples": count}
            for what in ("mean", "variance"):
                for estimator in ESTIMATORS:
                    found = torch.stack(errors[estimator, what])
                    row[f"{what}, {estimator}, %"] = 100 * float(found.square().mean().sqrt())
            rows.append(row)
    results.table(
        "Root mean square error",
        rows,
        f"Over {DRAWS} draws and 16 channels; the mean's in percent of the channel's standard deviation, the "
        "variance's relative. That of pooled falls with the root of the number of samples; mean_of_batches misses "
        "the variance between batches however many there are.",
    )
    results.write()


if __name__ == "__main__":
    main()
