"""What the old network says to photographs: scikit-learn's two, a temple and a flower, cut into crops."""

from functools import cache

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import interpolate

from network import PretrainedNetwork, as_seen_in_training

CROP, SIZE = 256, 128
"""Height and width of a crop in the photograph, and as the network sees it."""
ROWS, COLUMNS = 4, 7
"""How many crops of one photograph, evenly spaced; they overlap."""


@cache
def crops() -> Tensor:
    """All crops ``(56, 3, 128, 128)``."""
    found = []
    for photograph in load_sample_images().images:
        pixels = torch.tensor(photograph, dtype=torch.float32).permute(2, 0, 1)
        height, width = pixels.shape[1:]
        for row in range(ROWS):
            for column in range(COLUMNS):
                top, left = row * (height - CROP) // (ROWS - 1), column * (width - CROP) // (COLUMNS - 1)
                found.append(pixels[:, top : top + CROP, left : left + CROP])
    small = interpolate(torch.stack(found), size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return as_seen_in_training(small)


@torch.no_grad()
def answers(network: PretrainedNetwork) -> Tensor:
    """Which of ImageNet's thousand classes the network sees in each crop ``(56,)``, in evaluation."""
    network.eval()
    return torch.cat([network.backbone(part).argmax(dim=1) for part in crops().split(28)])


@cache
def old_answers() -> Tensor:
    """The same of the network as the package ships it."""
    return answers(PretrainedNetwork())


def kept(given: Tensor) -> float:
    """How many of the old answers are still given, in percent."""
    return 100 * float((given == old_answers()).float().mean())
