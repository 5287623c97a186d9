"""The network: one convolutional backbone with BatchNorm, and a head for each task."""

from torch import Tensor, nn

WIDTH = 64
"""Features that the backbone hands to the heads."""


def conv_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Backbone(nn.Module):
    """Images ``(N, 1, 8, 8)`` to features ``(N, 64)``; one BatchNorm layer in ``stem``, two in ``blocks``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(1, 16, stride=1)
        self.blocks = nn.Sequential(conv_block(16, 32, stride=2), conv_block(32, WIDTH, stride=2))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.stem(images))
        return features.mean(dim=(2, 3))


class MultiTaskNetwork(nn.Module):
    """``network(images, task)`` gives the logits of that task. The parity head has a BatchNorm layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.heads = nn.ModuleDict(
            {
                "digit": nn.Linear(WIDTH, 10),
                "parity": nn.Sequential(
                    nn.Linear(WIDTH, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)
                ),
            }
        )

    def forward(self, images: Tensor, task: str) -> Tensor:
        logits: Tensor = self.heads[task](self.backbone(images))
        return logits
