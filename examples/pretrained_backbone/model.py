"""The LightningModule: cross entropy of both new tasks, the heads alone or the whole network."""

from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from network import PretrainedNetwork


class TwoTasks(LightningModule):
    """Trains a pre-trained network on two new tasks; logs ``digit_accuracy`` and ``parity_accuracy`` in percent.

    Args:
        lr: Learning rate of the heads.
        backbone_lr: Of the backbone; None: no gradient reaches its weights, and the optimizer does not know them. Its
            running statistics are no weights and move all the same.
        momentum: Of the optimizer.
    """

    def __init__(self, lr: float = 0.01, backbone_lr: float | None = None, momentum: float = 0.9) -> None:
        super().__init__()
        self.network = PretrainedNetwork()
        self.lr = lr
        self.backbone_lr = backbone_lr
        self.momentum = momentum
        self.network.backbone.requires_grad_(backbone_lr is not None)
        # ImageNet's own answers are asked for, not trained.
        self.network.backbone._fc.requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits, parities = batch
        logits = self.network(images)
        loss = cross_entropy(logits["digit"], digits) + cross_entropy(logits["parity"], parities)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, *labels = batch
        for (task, logits), expected in zip(self.network(images).items(), labels, strict=True):
            correct = (logits.argmax(dim=1) == expected).float().mean()
            self.log(f"{task}_accuracy", 100 * correct, batch_size=len(images), prog_bar=True)

    def configure_optimizers(self) -> SGD:
        groups = [{"params": [*self.network.heads.parameters()]}]
        if self.backbone_lr is not None:
            trained = [parameter for parameter in self.network.backbone.parameters() if parameter.requires_grad]
            groups.append({"params": trained, "lr": self.backbone_lr})
        return SGD(groups, lr=self.lr, momentum=self.momentum)
