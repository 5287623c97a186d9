"""How far each estimator's variance is from that of the whole population, by batch size and by what a batch holds.

The population is what the first BatchNorm layer of a convolutional network sees of scikit-learn's 1,797 digits. One
pass over all of them estimates it, so that what differs is the estimator's doing.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_bn.functional import recalibrate
from lightning_bn.functional.recalibration.precise_bn import Estimator

BATCH_SIZES = (2, 8, 32, 128)


def digits() -> Tensor:
    """Images with pixels in [0, 1], shuffled."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
    return images[torch.randperm(len(images))]


def own_brightness(images: Tensor) -> Tensor:
    """Each image with a brightness of its own, so that its pixels have something in common."""
    return images + 0.5 * torch.randn(len(images), 1, 1, 1)


def two_sensors(images: Tensor) -> Tensor:
    """The first half as it is, the second one with another gain and offset."""
    half = len(images) // 2
    return torch.cat((images[:half], 2.5 * images[half:] + 0.5))


def shuffled(images: Tensor) -> Tensor:
    """In another order."""
    return images[torch.randperm(len(images))]


def error(images: Tensor, batch_size: int, estimator: Estimator) -> float:
    """Of the variance in percent, mean over channels."""
    network = nn.Sequential(nn.Conv2d(1, 32, 3, bias=False), nn.BatchNorm2d(32))
    with torch.no_grad():
        population = network[0](images).double().var(dim=(0, 2, 3))
    recalibrate(network, images.split(batch_size), estimator=estimator)
    return 100 * float((network[1].running_var.double() / population - 1).mean())


def main() -> None:
    """Prints a line per kind of batch and batch size."""
    torch.manual_seed(0)
    images = digits()
    data = {
        "digits, shuffled": images,
        "each with its own brightness, shuffled": own_brightness(images),
        "two sensors, shuffled": shuffled(two_sensors(images)),
        "two sensors, one per batch": two_sensors(images),
    }
    print("error of the variance, %, mean over the channels of the first BatchNorm layer")
    print(f"{'data':<40} {'batch size':>10} {'mean_of_batches':>16} {'pooled':>8}")
    for name, values in data.items():
        for size in BATCH_SIZES:
            means, pooled = error(values, size, "mean_of_batches"), error(values, size, "pooled")
            print(f"{name:<40} {size:>10} {means:>16.1f} {round(pooled, 1) + 0.0:>8.1f}")


if __name__ == "__main__":
    main()
