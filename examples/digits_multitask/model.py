"""The LightningModule: cross entropy summed over the tasks of a batch, SGD over what may train."""

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD

import lightning_bn
from network import MultiTaskNetwork

Batch = dict[str, tuple[Tensor, Tensor]]
"""For each task: images and labels."""


class DigitsModule(LightningModule):
    """Trains a backbone and a head for each task that the batches carry; logs ``<task>_accuracy`` in percent.

    Args:
        pretrained: A checkpoint of this module to start from.
        train_backbone: Whether the backbone's weights train. If not, no gradient reaches them and the optimizer does
            not know them. Their BatchNorm statistics are no weights and move all the same.
        lr: Learning rate.
        momentum: Of the optimizer.
    """

    def __init__(
        self, pretrained: str | None = None, train_backbone: bool = True, lr: float = 0.02, momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.network = MultiTaskNetwork()
        self.lr = lr
        self.momentum = momentum
        if pretrained is not None:
            self.load_state_dict(torch.load(pretrained, weights_only=True)["state_dict"])
        self.network.backbone.requires_grad_(train_backbone)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = []
        for task, (images, labels) in batch.items():
            # For callbacks that know tasks; where there is none it changes nothing.
            with lightning_bn.task(task):
                losses.append(cross_entropy(self.network(images, task), labels))
        loss = torch.stack(losses).sum()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for task, (images, labels) in batch.items():
            with lightning_bn.task(task):
                correct = self.network(images, task).argmax(dim=1) == labels
            self.log(f"{task}_accuracy", 100 * correct.float().mean(), batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> SGD:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return SGD(trainable, lr=self.lr, momentum=self.momentum)
